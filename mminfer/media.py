"""Images and videos as users load them: what `mminfer.inputs` offers to programs outside."""

from mminfer.inputs.images import load_image
from mminfer.inputs.videos import frames, load_video, read_video

__all__ = ["frames", "load_image", "load_video", "read_video"]
