"""What the techniques did to a prompt: collected while it runs, then drawn."""

from mminfer.inspection.collecting import inspect_chat, inspect_inputs
from mminfer.inspection.drawing import draw_image
from mminfer.inspection.facts import Inspection
from mminfer.inspection.page import page_html

__all__ = ["Inspection", "draw_image", "inspect_chat", "inspect_inputs", "page_html"]
