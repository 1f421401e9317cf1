"""The source of Python's standard library as a training corpus: which files, which are held out, and their tokens."""

import ast
import hashlib
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"  # between two files; id 0
HELD_OUT_PERCENT = 4
# What others installed, tables of characters, and text that is one long string.
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "lib-dynload"}
_TESTS = {"test", "tests", "idle_test"}
# Line ends stand alone, so that a prompt that ends with one is cut into the tokens that training saw; indentation
# without its last space; words with the space before them; up to three digits; runs of other signs.
_SPLIT = r"\n+| +(?= )| ?[^\W\d]+|\d{1,3}| ?[^\s\w]+|[^\S\n]+"


@dataclass(frozen=True)
class Corpus:
    """Texts of the files to train on and of those held out, and a hash of all names and contents."""

    train: list[str]  # the library proper first, then its tests
    library: int  # how many of `train` are no tests
    held_out: list[str]
    sha256: str

    @property
    def held_out_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.held_out)


def read_corpus(folder: Path | None = None) -> Corpus:
    """Every module below the folder (this Python's standard library) that parses; held out by a hash of its name."""
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    library: list[str] = []
    tests: list[str] = []
    held_out: list[str] = []
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        # _sysconfigdata tells about the machine, a link leads out of the library
        if _LEFT_OUT & set(Path(name).parts) or name.startswith("_sysconfigdata") or path.is_symlink():
            continue
        content = path.read_bytes()
        if not _parses(content):
            continue
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
        fraction = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 100
        kept = held_out if fraction < HELD_OUT_PERCENT else tests if _TESTS & set(Path(name).parts) else library
        kept.append(content.decode().replace("\r\n", "\n"))
    if not library:
        raise ValueError(f"{folder} holds no Python source; name the folder of a standard library")
    return Corpus(library + tests, len(library), held_out, digest.hexdigest())


def _parses(content: bytes) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bool(ast.parse(content.decode()).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_SPLIT), "isolated"), as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
        ),
    )
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, {vocab_size=} were asked for")
    return tokenizer


def end_id(tokenizer: Tokenizer) -> int:
    """The id of END_OF_TEXT."""
    return tokenizer.get_vocab()[END_OF_TEXT]


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one row of tokens, END_OF_TEXT before each and after the last."""
    end = [end_id(tokenizer)]
    rows = [end] + [[*encoding.ids, *end] for encoding in tokenizer.encode_batch_fast(texts)]
    return np.concatenate([np.array(row, np.int32) for row in rows])


def line_ends(tokenizer: Tokenizer) -> np.ndarray:
    """bool [vocabulary]: the tokens that are nothing but line ends."""
    vocabulary = tokenizer.get_vocab()
    found = np.zeros(len(vocabulary), bool)
    found[[i for word, i in vocabulary.items() if set(word) == {"Ċ"}]] = True  # the byte alphabet's newline
    return found


def openings(tokenizer: Tokenizer, tokens: np.ndarray) -> np.ndarray:
    """Where functions and classes of the outermost level begin: `def` or `class` right behind a line end."""
    words = [tokenizer.get_vocab()[word] for word in ("def", "class")]
    return np.flatnonzero(np.isin(tokens[1:], words) & line_ends(tokenizer)[tokens[:-1]]) + 1
