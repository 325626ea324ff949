"""How the page looks."""

STYLE = """
:root { --ink: #16202e; --soft: #566274; --line: #d9dee6; --paper: #fff; --ground: #f4f6f9; --blue: #2563c9;
  --full: #c3cbd8; --strike: #d6095f; color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
main { max-width: 1360px; margin: 0 auto; padding: 20px 16px 60px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 20px; margin: 0 0 10px; }
h1 small { font-weight: 400; color: var(--soft); font-size: 17px; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 16px;
  margin-top: 16px; }
p { margin: 0 0 8px; } ul { margin: 0; padding-left: 20px; } .soft { color: var(--soft); }
.tiles { display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(155px, 1fr)); margin-top: 14px; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: 8px 12px; }
.tile b { display: block; font-size: 24px; line-height: 1.3; } .tile span { color: var(--soft); font-size: 14px; }
.answers { display: grid; gap: 10px; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr));
  margin-top: 12px; }
.answers div { border-left: 4px solid var(--blue); background: var(--ground); padding: 8px 12px; white-space: pre-wrap;
  border-radius: 0 8px 8px 0; }
.answers div + div { border-color: var(--full); } .answers b { display: block; font-size: 14px; color: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: 10px 26px; font-size: 14px; line-height: 1.4; margin: 0 0 14px;
  padding: 0; list-style: none; }
.legend li { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: center; flex: 1 1 400px; max-width: 640px; }
.legend li > :last-child { flex: 1 1 200px; }
.keys { display: flex; flex-wrap: wrap; gap: 10px; } .key { text-align: center; font-size: 12px; line-height: 1.3; }
.key i { display: block; width: 30px; height: 30px; margin: 0 auto; position: relative; overflow: hidden;
  background: linear-gradient(135deg, #7fa0c9, #b9c98f); }
.key i.blank { background: none; }
.key i svg, .key i em { position: absolute; inset: 0; width: 100%; height: 100%; }
.views { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; margin-bottom: 12px; font-size: 15px; }
.views label { display: flex; gap: 5px; align-items: center; cursor: pointer; }
.views input[type=range] { width: min(220px, 40vw); }
.pictures { display: grid; gap: 16px 14px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(var(--thumb), 100%), 1fr)); }
figure { margin: 0; content-visibility: auto; contain-intrinsic-size: auto 300px; scroll-margin-top: 12px; }
figure.double { grid-column: span 2; } figure.large { grid-column: 1 / -1; }
figure:target figcaption b { background: #ffe9a8; }
figcaption { font-size: 14px; line-height: 1.35; margin-top: 5px; color: var(--soft); }
figcaption b { color: var(--ink); }
.grids { display: flex; flex-wrap: wrap; gap: 6px; cursor: zoom-in; max-width: 1000px; }
figure.large .grids { cursor: zoom-out; }
.grid { position: relative; flex: 1 1 130px; } .grid img { width: 100%; height: auto; display: block; }
.grid canvas { position: absolute; inset: 0; width: 100%; height: 100%; display: none; }
.grid .plain { display: none; }
[data-view=plain] .marked, [data-view=layer] .marked { display: none; }
[data-view=plain] .plain, [data-view=layer] .plain, [data-view=layer] .grid canvas { display: block; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; white-space: nowrap; color: var(--soft); }
th, td { padding: 4px 10px 4px 0; vertical-align: top; }
td { border-top: 1px solid var(--line); white-space: nowrap; } td:first-child { text-align: right; width: 3em; }
th:first-child { text-align: right; }
.bar { display: block; height: 9px; min-width: 110px; background: var(--full); border-radius: 2px; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--blue); }
.strip { max-height: 420px; overflow: auto; border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px;
  white-space: pre-wrap; line-height: 1.9; }
.strip .mark { color: var(--soft); font-size: 13px; } .strip s { text-decoration-color: var(--strike);
  text-decoration-thickness: 2px; }
.strip sub { color: var(--strike); font-size: 12px; }
.chip { background: #e3ecfa; color: #1b478f; border-radius: 5px; padding: 1px 7px; font-size: 13px;
  text-decoration: none; white-space: nowrap; }
pre { margin: 0; background: var(--ground); border-radius: 8px; padding: 12px; overflow: auto; font-size: 14px; }
@media (max-width: 600px) { figure.double { grid-column: auto; } main { padding: 12px 8px 40px; }
  section { padding: 12px 10px; } h1 { font-size: 22px; }
  .tile b { font-size: 20px; } .tiles { grid-template-columns: repeat(2, 1fr); } }
"""
