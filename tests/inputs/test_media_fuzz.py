"""Files of whatever bytes: loaded, or refused by name."""

import pytest
from hypothesis import HealthCheck, given, settings

from mminfer.media import load_image, load_video
from tests.inputs.media_bytes import IMAGES, VIDEOS, fuzz_media, media_files, whole_file


@pytest.mark.parametrize("kind", [*IMAGES, *VIDEOS])
def test_whole_files_are_loaded(kind, tmp_path):
    """What is mutated below is a file that the loader of its kind takes."""
    path = tmp_path / f"file.{kind.lower()}"
    path.write_bytes(whole_file(kind))
    if kind in IMAGES:
        assert load_image(path).size == (16, 16)
    else:
        assert load_video(path).shape == (4, 16, 16, 3)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(file=media_files())
def test_files_of_any_bytes_load_or_are_refused(file):
    fuzz_media(file)
