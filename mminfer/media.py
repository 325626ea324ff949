"""Images and videos as users load them: what `mminfer.inputs.media` offers to programs outside."""

from mminfer.inputs.media import frames, load_image, load_video, read_video

__all__ = ["frames", "load_image", "load_video", "read_video"]
