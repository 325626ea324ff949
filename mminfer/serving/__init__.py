"""The HTTP server behind `mminfer serve`: OpenAI's chat completions over the scheduler. Needs the extra `serve`."""
