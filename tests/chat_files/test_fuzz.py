"""Changed files, a few in every run."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.chat_files.fuzzing import fuzz_chat_file


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_changed_files_load_as_they_were_or_are_refused(data):
    fuzz_chat_file(data)
