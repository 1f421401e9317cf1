"""Growing text: any ids in any pieces, stop strings, and the sink that the engine calls."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxengine.errors import RequestError
from jaxengine.text import Detokenizer, TextSink
from jaxengine.tokenizer import Tokenizer
from tests.references.gguf_files import write_gguf
from tests.vocabularies import byte_level, word_level

UNICORN = "\N{UNICORN FACE}"
BYTES = Tokenizer(byte_level(), {"eos_token": "<|im_end|>"})


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    path = tmp_path_factory.mktemp("spm") / "x.gguf"
    write_gguf(path, "sentencepiece")
    return Tokenizer.load(path)


def streamed(tokenizer, ids, cuts=None, stop=(), **options):
    """The joined deltas; checks `.text` on the way."""
    detokenizer = Detokenizer(tokenizer, stop, **options)
    text, kept = "", 0
    edges = [0, *sorted(cuts or range(len(ids))), len(ids)]
    for start, end in pairwise(edges):
        update = detokenizer.append(ids[start:end])
        text += update.text_delta
        kept += update.keep
        assert detokenizer.text == text
        if update.stop is not None:
            assert detokenizer.finish() == ""
            return text, update.stop, kept
        assert update.keep == end - start
    text += detokenizer.finish()
    assert detokenizer.text == text
    assert detokenizer.finish() == ""
    return (text, None, kept) if stop else text


@given(st.data())
def test_any_ids_in_any_pieces_give_the_text_of_all_of_them(data):
    ids = data.draw(st.lists(st.integers(0, 610) | st.integers(3, 258), max_size=40))
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=8))
    skip = data.draw(st.booleans())
    text = BYTES.decode(ids, skip)
    assert streamed(BYTES, ids, skip_special_tokens=skip) == text
    assert streamed(BYTES, ids, cuts, skip_special_tokens=skip) == text


@given(st.text(max_size=40), st.data())
def test_any_text_comes_back(pieces, text, data):
    for tokenizer in (BYTES, pieces):
        ids = tokenizer.encode(text, add_special_tokens=False)
        cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=8))
        assert streamed(tokenizer, ids, cuts) == tokenizer.decode(ids)


def text_of_pieces(pieces, ids):
    """What a stream of SentencePiece tokens should say: of each run of bytes the characters at its front, and a
    replacement character for each byte behind them."""
    text, run = "", b""
    heard = [i for i in ids if i not in pieces.special_ids and i < pieces.vocab_size]
    for i in [*heard, None]:
        if i is not None and 3 <= i < 259:
            run += bytes([i - 3])
            continue
        good = max(k for k in range(len(run) + 1) if is_utf8(run[:k]))
        text += run[:good].decode() + "\ufffd" * (len(run) - good)
        text += pieces.decode_inside([] if i is None else [i])
        run = b""
    return text.removeprefix(" ")


def is_utf8(raw):
    return raw.decode(errors="replace").encode() == raw


@given(st.data())
def test_sentencepiece_bytes_that_are_no_text(pieces, data):
    some = st.integers(3, 258) | st.integers(0, 760) | st.sampled_from([198, 172, 196, 754])
    some = some.filter(lambda i: i != 3 + ord(" "))  # as the first byte it is stripped, and has not been shown
    ids = data.draw(st.lists(some, max_size=20))
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=8))
    text = streamed(pieces, ids)
    assert streamed(pieces, ids, cuts) == text == text_of_pieces(pieces, ids)


def test_a_character_that_later_bytes_spoil(pieces):
    e_acute, lone = [3 + 0xC3, 3 + 0xA9], 3 + 0xC3
    word = pieces.encode("the", add_special_tokens=False)
    assert pieces.decode([*e_acute, lone, *word]) == "\ufffd\ufffd\ufffd the"
    assert streamed(pieces, [*e_acute, lone, *word, *word]) == "é\ufffd the the"


@given(st.data())
def test_stop_strings(data):
    text = data.draw(st.text("ab \u00e9" + UNICORN, max_size=30))
    stops = data.draw(st.lists(st.text("ab \u00e9" + UNICORN, min_size=1, max_size=4), min_size=1, max_size=3))
    include = data.draw(st.booleans())
    ids = BYTES.encode(text)
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=8))
    shown, stop, kept = streamed(BYTES, ids, cuts, stops, include_stop_str=include)
    assert (shown, stop, kept) == streamed(BYTES, ids, None, stops, include_stop_str=include)
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    if not ends:
        assert (shown, stop, kept) == (text, None, len(ids))
        return
    end, begin, first = min(ends)  # the one that ends first, as if letters came singly
    assert (shown, stop) == (text[: end if include else begin], first)
    assert BYTES.decode(ids[:kept]).startswith(text[:end])
    assert not BYTES.decode(ids[: kept - 1]).startswith(text[:end])


def test_what_could_begin_a_stop_string_is_held_back():
    detokenizer = Detokenizer(BYTES, ["STOP!"])
    shown = [detokenizer.append(BYTES.encode(letter)).text_delta for letter in "aSTSTOP?"]
    assert shown == ["a", "", "", "ST", "", "", "", "STOP?"]
    inclusive = Detokenizer(BYTES, ["STOP!"], include_stop_str=True)
    assert [inclusive.append(BYTES.encode(letter)).text_delta for letter in "aS"] == ["a", "S"]


def test_a_stop_string_in_a_token_with_half_a_character():
    ids = BYTES.encode("a é")
    assert BYTES.token_text(ids[1]) == " \ufffd"  # a space and the first byte of two
    assert streamed(BYTES, ids, stop=[" "]) == ("a", " ", 2)


def test_held_text_comes_at_the_end():
    detokenizer = Detokenizer(BYTES, ["STOP"])
    ids = BYTES.encode("x STO")
    assert detokenizer.append(ids).text_delta == "x "
    assert detokenizer.finish() == "STO"


def test_half_a_character_at_the_end():
    ids = [BYTES.token_id(c) for c in "ðŁ¦"]  # the first bytes of a unicorn, as this alphabet spells them
    detokenizer = Detokenizer(BYTES)
    assert detokenizer.append([*BYTES.encode("a"), *ids]).text_delta == "a"
    assert detokenizer.finish() == "\ufffd"


def test_min_tokens_pass_stop_strings_over():
    ids = [i for letter in "abab" for i in BYTES.encode(letter)]
    assert streamed(BYTES, ids, stop=["b"]) == ("a", "b", 2)
    assert streamed(BYTES, ids, stop=["b"], min_tokens=1) == ("a", "b", 2)
    assert streamed(BYTES, ids, stop=["b"], min_tokens=2) == ("aba", "b", 4)
    assert streamed(BYTES, ids, stop=["ba"], min_tokens=2) == ("a", "ba", 3)  # it may begin earlier
    assert streamed(BYTES, ids, stop=["b"], min_tokens=4) == ("abab", None, 4)


def test_cleaned_up_text_comes_at_the_end():
    tokenizer = Tokenizer(word_level(), clean_up_spaces=True)
    ids = tokenizer.encode("hello , world do n't .")
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.append(ids).text_delta == ""
    assert detokenizer.finish() == "hello, world don't." == tokenizer.decode(ids)
    with pytest.raises(RequestError, match="stop_token_ids"):
        Detokenizer(tokenizer, ["x"])


def params(**changed):
    fields = {"stop": (), "include_stop_str_in_output": False, "skip_special_tokens": True, "detokenize": True,
              "spaces_between_special_tokens": True, "min_tokens": 0}  # fmt: skip
    return SimpleNamespace(**fields | changed)


def test_sink():
    sink = TextSink(BYTES)
    sink.open("plain", [1, 2, 3], params())
    sink.open("stops", [1], params(stop=("lo",)))
    sink.open("silent", [1], params(detokenize=False))
    sink.open("special", [1], params(skip_special_tokens=False))
    hello = [BYTES.encode(letter)[0] for letter in "hello!"]
    updates = sink.update([("silent", hello), ("plain", [*hello, 2]), ("stops", hello), ("special", [2])])
    assert [(u.text_delta, u.stop, u.keep) for u in updates] == [
        ("", None, 6), ("hello!", None, 7), ("hel", "lo", 5), ("<|im_end|>", None, 1)]  # fmt: skip
    sink.update([("plain", [BYTES.token_id("ð")])])
    assert [sink.close(key) for key in ("plain", "stops", "silent", "special", "plain")] == ["\ufffd", "", "", "", ""]
    with pytest.raises(KeyError):
        sink.update([("plain", hello)])


def test_text_that_is_wanted_at_the_end_only_comes_from_close():
    ids = BYTES.encode("héllo 🙂!")
    for shown in (0, 3):
        for output in (ids, ids[:-2], [*ids, 2]):  # whole, ending within a character perhaps, and with a special token
            sink = TextSink(BYTES)
            sink.open("a", [1], params())
            text = "".join(update.text_delta for update in sink.update([("a", output[:shown])]))
            assert text + sink.close("a", output[shown:]) == BYTES.decode(output)
    sink = TextSink(None)
    sink.open("silent", [1], params(detokenize=False))
    assert sink.close("silent", ids) == ""


def test_spaces_between_special_tokens():
    tokenizer = Tokenizer(word_level())
    ids = tokenizer.encode("hello <a> <b> <a> world")
    assert tokenizer.decode(ids, False) == "hello <a> <b> <a> world"
    assert tokenizer.decode(ids, False, False) == "hello <a><b><a> world"
    assert tokenizer.decode(ids, True, False) == "hello world"
    assert streamed(tokenizer, ids, skip_special_tokens=False, spaces_between_special_tokens=False) == tokenizer.decode(
        ids, False, False
    )
