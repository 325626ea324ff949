"""What samples may be, how they are parted, and what is said of wrong ones."""

import json

import pytest
from PIL import Image

from mminfer import InputError
from mminfer.calibration.samples import checked_samples, read_samples, split


def chat(shade, question):
    image = Image.new("RGB", (16, 16), (shade, 0, 0))
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def test_samples_of_one_content_stay_on_one_side(nano_engine):
    chats = [chat(shade, question) for shade in (0, 50, 100, 150, 200) for question in ("one", "two")]
    samples = checked_samples(nano_engine, [*chats, chats[0]])
    assert len(samples) == 10  # none twice
    for seed in range(4):
        parts = split(samples, 0.5, seed)
        assert len(parts.tuning) + len(parts.held_out) == 10 and min(len(parts.tuning), len(parts.held_out)) >= 4
        assert not {s.content for s in parts.tuning} & {s.content for s in parts.held_out}
    assert split(samples, 0.5, 0).digest == split(samples, 0.5, 0).digest
    assert len({split(samples, 0.5, seed).digest for seed in range(4)}) > 1
    assert len(split(samples, 0.99, 0).tuning) == len(split(samples, 0.01, 0).held_out) == 4


def test_samples_that_differ_in_their_order_alone_are_two(nano_engine):
    """What was measured of one is never taken for the other's."""
    (turn,) = chat(200, "one")
    other = [{"role": "user", "content": turn["content"][::-1]}]
    samples = checked_samples(nano_engine, [*(chat(shade, "one") for shade in (0, 50, 100)), [turn], other])
    assert len(samples) == 5 and samples[3].content == samples[4].content


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "0 samples of 0 different contents: wanted 4 or more"),
        ("a chat", "samples of type str: wanted a list of chats"),
        ([chat(0, "a"), chat(0, "b"), chat(1, "a"), chat(2, "a")], "4 samples of 3 different contents"),
        ([chat(0, "a"), [{"role": "user", "content": ""}]], "sample 1: "),
    ],
)
def test_wrong_samples(nano_engine, samples, message):
    with pytest.raises(InputError, match=message):
        checked_samples(nano_engine, samples)


def test_a_file_of_lines(tmp_path):
    file = tmp_path / "samples.jsonl"
    messages = [{"role": "user", "content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": "c"}]}]
    lines = [{"prompt": "a", "images": ["a.png"], "videos": ["/v.mp4"]}, {"messages": messages}]
    file.write_text("\n\n".join(map(json.dumps, lines)), "utf-8")
    first, second = read_samples(file)
    assert first[0]["content"] == [
        {"type": "image", "image": str(tmp_path / "a.png")},
        {"type": "video", "video": "/v.mp4"},
        {"type": "text", "text": "a"},
    ]
    assert second[0]["content"][0] == {"type": "image", "image": str(tmp_path / "b.png")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no sample in it"),
        ("{", "line 1: no JSON"),
        ("[]", r"line 1: \[\]: wanted"),
        ('{"images": ["a.png"]}', 'line 1: "prompt" is None'),
        ('{"prompt": "a", "images": "a.png"}', "line 1: \"images\" is 'a.png': wanted a list"),
        ('{"prompt": "a", "label": 1}', "line 1: unknown 'label'"),
        ('{"messages": "a"}', "line 1: \"messages\" is 'a'"),
    ],
)
def test_wrong_lines(tmp_path, text, message):
    file = tmp_path / "samples.jsonl"
    file.write_text(text, "utf-8")
    with pytest.raises(InputError, match=message):
        read_samples(file)
    with pytest.raises(InputError, match="No such file"):
        read_samples(tmp_path / "none")
