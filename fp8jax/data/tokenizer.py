"""Turn text into token ids and back, with the number of text bytes that every token stands for.

    tokenizer = load("byte")                        # ids 0 to 255 are bytes, 256 ends a document
    tokenizer = load("path/to/tokenizer.json")      # a Hugging Face file; needs `pip install tokenizers`
    tokenizer = load("tekken")                      # Mistral's; needs `pip install tiktoken mistral-common`
    tokenizer = of(config.data)                     # the one that config.data.tokenizer names
    ids = tokenizer.encode("Anne Elliot")           # numpy array, uint16 or uint32
    tokenizer.decode(ids)                           # str
    tokenizer.token_bytes[ids].sum()                # 11: bytes of text, the denominator of bits per byte

All kinds of tokenizer have the attributes of `ByteTokenizer`. Encoding never yields the
end-of-document id: that one is added between documents, and text that spells a special token is
encoded as ordinary text.

Only lossless, byte-level tokenizers are read (tokenizer.json files of Llama 3, OLMo 2, GPT-2;
Mistral's tekken.json): with others, bits per byte is not defined; `lossless` tries each when it is
read. One that normalises Unicode (Qwen's) is accepted with `allow_normalisation`: the text is then
the normalised one. No file is downloaded.
"""

import base64
import dataclasses
import functools
import hashlib
import importlib.util
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fp8jax import files
from fp8jax.config import Config, ConfigError, DataConfig, parse_sources, read_json
from fp8jax.data import lossless, trial

# Ids that a vocabulary may have; a larger one is a damaged file, for which no memory should be
# asked.
_MOST_IDS = 1 << 24
# The most bytes of a tokenizer's file and of its values; the largest in use have 40 MB.
_MOST_BYTES, _MOST_MEMORY = 1 << 28, 1 << 29
END_OF_DOCUMENT_NAMES = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>")


@dataclasses.dataclass(frozen=True, eq=False)
class ByteTokenizer:
    """UTF-8 bytes as tokens.

    Attributes:
        fingerprint: identifies the tokenizer; equal fingerprints mean equal ids for equal text.
        vocab_size: ids are 0 to vocab_size - 1.
        end_of_document: the id that ends every document.
        token_bytes: int32 [vocab_size], bytes of text that a token stands for; 0 for special
            tokens.
        file: path that the tokenizer was read from, if any.
        notes: what a user should know about how the file was read; a line each.
    """

    fingerprint: str = "byte"
    vocab_size: int = 257
    end_of_document: int = 256
    token_bytes: np.ndarray = dataclasses.field(
        default_factory=lambda: np.array([1] * 256 + [0], np.int32)
    )
    file: pathlib.Path | None = None
    notes: tuple[str, ...] = ()

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return token ids, uint16 [bytes of text]; `bytes` need not be valid UTF-8."""
        raw = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(dtype(self.vocab_size))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of every text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Any) -> str:
        """Return the text of the ids, with U+FFFD for what is not UTF-8 and without end-of-document
        ids.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        ids = _checked(ids, self.vocab_size)
        return (
            ids[ids != self.end_of_document]
            .astype(np.uint8)
            .tobytes()
            .decode("utf-8", errors="replace")
        )


class HuggingFaceTokenizer:
    """A byte-level tokenizer.json; it has the attributes and methods of `ByteTokenizer`."""

    def __init__(self, path: str, *, allow_normalisation: bool = False):
        """Read the file.

        Args:
            path: path of a tokenizer.json.
            allow_normalisation: accept one that first brings text into a Unicode form, such as NFC.

        Raises:
            ConfigError: the `tokenizers` package is missing, the file cannot be read, is not
                byte-level, loses text, or has no special token named like one of
                END_OF_DOCUMENT_NAMES.
        """
        self.file = pathlib.Path(path)
        self._tokenizer, spec, self.fingerprint = _read(path)
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content: index for index, token in added.items() if token.special}
        ends = [special[name] for name in END_OF_DOCUMENT_NAMES if name in special]
        if not ends:
            raise _error(
                path,
                f"has no end-of-document token; add one of {', '.join(END_OF_DOCUMENT_NAMES)}, special",
            )
        self.end_of_document = ends[0]
        self.vocab_size = max(vocab.values()) + 1
        if self.vocab_size > _MOST_IDS:
            raise _error(path, f"has id {self.vocab_size - 1}; ids go up to {_MOST_IDS - 1}")
        self.token_bytes = np.zeros(self.vocab_size, np.int32)
        for (
            token,
            index,
        ) in vocab.items():  # a byte-level vocabulary spells every byte as one character
            self.token_bytes[index] = len(token)
        for index, token in added.items():
            self.token_bytes[index] = 0 if token.special else len(token.content.encode("utf-8"))
        self.notes = _without_dropout(self._tokenizer)
        forms = lossless.forms_of(spec.get("normalizer"))
        if forms and not allow_normalisation:
            raise _error(
                path,
                f"brings text into {' and '.join(forms)}, so that text is not given back as it "
                f"was; say "
                "--allow_normalisation (prepare) or --config.data.allow_normalisation=True to "
                "take bits per byte over that text",
            )
        spelled = [token.content for token in added.values() if not token.special]
        _check_lossless(path, self, lossless.cause(spec), added=spelled, forms=forms)
        self.notes += tuple(f"its text is brought into {form} first" for form in forms)

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return token ids, uint16 or uint32 [tokens]; no special tokens are added.

        Raises:
            UnicodeDecodeError: `bytes` are not UTF-8.
        """
        text = text if isinstance(text, str) else text.decode("utf-8")
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of every text, faster than one by one."""
        kind = dtype(self.vocab_size)
        return [
            np.array(found.ids, kind)
            for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def decode(self, ids: Any) -> str:
        """Return the text of the ids, without special tokens.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        return self._tokenizer.decode(
            _checked(ids, self.vocab_size).tolist(), skip_special_tokens=True
        )


class TekkenTokenizer:
    """Mistral's tekken.json, with the interface of `ByteTokenizer`; its first ids are special, 2
    ends a document.
    """

    end_of_document = 2
    notes: tuple[str, ...] = ()

    def __init__(self, path: str):
        """Read the file.

        Raises:
            ConfigError: the `tiktoken` package is missing, or the file cannot be read.
        """
        try:
            import tiktoken
        except ImportError:
            raise _error(
                path, "needs the package tiktoken; pip install tiktoken, or use 'byte'"
            ) from None
        self.file = pathlib.Path(path)
        content, values = _content(path)
        self.fingerprint = f"sha256:{hashlib.sha256(content).hexdigest()}"
        try:
            config, vocab = values["config"], values["vocab"]
            self.vocab_size, self._special = (
                config["default_vocab_size"],
                config["default_num_special_tokens"],
            )
            if (
                not 0
                <= self._special
                <= self.vocab_size
                <= min(len(vocab) + self._special, _MOST_IDS)
            ):
                raise ValueError(
                    f"{self.vocab_size} ids, {self._special} of them special, of {len(vocab)} tokens"
                )
            texts = [
                base64.b64decode(token["token_bytes"])
                for token in vocab[: self.vocab_size - self._special]
            ]
            ranks = {text: rank for rank, text in enumerate(texts)}
            self._encoding = tiktoken.Encoding(
                "tekken", pat_str=config["pattern"], mergeable_ranks=ranks, special_tokens={}
            )
        except (ValueError, KeyError, TypeError) as error:
            raise _error(path, f"is not a tekken.json: {error!r}") from None
        self.token_bytes = np.array([0] * self._special + [len(text) for text in texts], np.int32)
        _check_lossless(path, self, "")

    def encode(self, text: str | bytes) -> np.ndarray:
        """Return token ids, uint16 or uint32 [tokens]; no special tokens are added."""
        text = text if isinstance(text, str) else text.decode("utf-8")
        return (self._encoding.encode_to_numpy(text, disallowed_special=()) + self._special).astype(
            dtype(self.vocab_size)
        )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of every text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Any) -> str:
        """Return the text of the ids, with U+FFFD for what is not UTF-8 and without special tokens.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        ids = _checked(ids, self.vocab_size)
        return self._encoding.decode((ids[ids >= self._special] - self._special).tolist())


Tokenizer = ByteTokenizer | HuggingFaceTokenizer | TekkenTokenizer


@functools.lru_cache(maxsize=4)
def load(name: str, *, allow_normalisation: bool = False) -> Tokenizer:
    """Return the tokenizer called `name`, which is read once per process.

    Args:
        name: 'byte', 'tekken' or the path of a tokenizer.json or tekken.json.
        allow_normalisation: accept one that first brings text into a Unicode form.

    Raises:
        ConfigError: the file does not exist or cannot be used.
    """
    if name == "byte":
        return ByteTokenizer()
    if away := files.elsewhere(name):
        raise ConfigError(f"config.data.tokenizer: {away}")
    path = _installed_tekken() if name == "tekken" else name
    if _is_tekken(path):
        return TekkenTokenizer(path)
    return HuggingFaceTokenizer(path, allow_normalisation=allow_normalisation)


def of(data: DataConfig) -> Tokenizer:
    """Return the tokenizer of a config's data; 'auto' is that of the first source, bytes for the
    embedded corpus.

    Raises:
        ConfigError: as `load`, or the directory of 'auto' does not exist.
    """
    source = parse_sources(data.source)[0][0]
    if data.tokenizer != "auto":
        return load(data.tokenizer, allow_normalisation=data.allow_normalisation)
    if source == "embedded":
        return load("byte")
    directory = pathlib.Path(source)
    if not any((directory / name).is_file() for name in ("tokenizer.json", "index.json")):
        raise ConfigError(
            f"config.data.source: {directory / 'index.json'}: no such file; source is "
            f"'embedded' or a directory of prepared "
            "token shards; for Megatron files set config.data.tokenizer"
        )
    return of_directory(directory, allow_normalisation=data.allow_normalisation)


def of_directory(directory: pathlib.Path, *, allow_normalisation: bool = False) -> Tokenizer:
    """Return the tokenizer that lies in a directory of token shards; bytes if there is none.

    The index says whether text may be normalised, as given when it was prepared.

    Raises:
        ConfigError: as `load`.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        return load("byte")
    return load(str(path), allow_normalisation=allow_normalisation or _normalises(directory))


def _normalises(directory: pathlib.Path) -> bool:
    try:
        index = read_json(directory / "index.json")
    except (OSError, ConfigError):  # reported when the shards are read
        return False
    return isinstance(index, dict) and index.get("normalised") is True


def train(texts: Iterable[str], vocab_size: int) -> str:
    """Train a byte-level BPE, which cuts text into words as GPT-2's does; return the content of a
    tokenizer.json.

    Raises:
        ConfigError: the `tokenizers` package is missing, or vocab_size is too small for all bytes
            and the end of document.
    """
    if vocab_size < 257:
        raise ConfigError(
            f"--train_tokenizer: {vocab_size} is below 257, one id a byte and one that ends "
            f"documents"
        )
    try:
        import tokenizers
    except ImportError:
        raise ConfigError(
            "--train_tokenizer: needs the package tokenizers; pip install tokenizers"
        ) from None
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe.to_str(pretty=True)


def dtype(vocab_size: int) -> np.dtype:
    """Return the smallest little-endian dtype for token ids: uint16 up to 65536 ids, otherwise
    uint32.
    """
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def vocab_size(config: Config) -> int:
    """Return the embedding's rows: `config.model.vocab_size`, or the tokenizer's size rounded up to
    a multiple of 128.

    Raises:
        ConfigError: `config.model.vocab_size` is too small for the tokenizer.
    """
    needed = of(config.data).vocab_size
    if config.model.vocab_size is None:
        return -(-needed // 128) * 128
    if config.model.vocab_size < needed:
        raise ConfigError(
            f"config.model.vocab_size: {config.model.vocab_size} is below the {needed} ids of "
            f"tokenizer "
            f"{config.data.tokenizer!r}; set it to None or at least {needed}"
        )
    return config.model.vocab_size


def _read(path: str) -> tuple[Any, dict[str, Any], str]:
    """Return the library's tokenizer, set to encode the text and no more, the file's JSON, and its
    fingerprint.
    """
    try:
        import tokenizers
    except ImportError:
        raise _error(
            path, "needs the package tokenizers; pip install tokenizers, or use 'byte'"
        ) from None
    content, spec = _content(path)
    try:
        if not isinstance(spec, dict):
            raise ValueError("is not a JSON object")
        trial.run(path, lossless.probes())
        tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except (KeyboardInterrupt, SystemExit):
        raise
    except (
        BaseException
    ) as error:  # the library raises bare Exception, and its panics are BaseExceptions
        raise _error(path, f"is not a tokenizer.json: {_first_line(error)}") from None
    if '"ByteLevel"' not in json.dumps(spec.get("decoder")):
        raise _error(
            path,
            "is not byte-level (its decoder is not ByteLevel); use a byte-level tokenizer or 'byte'",
        )
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, spec, f"sha256:{hashlib.sha256(content).hexdigest()}"


def _content(path: str) -> tuple[bytes, Any]:
    """Return a file's bytes, and the JSON in them.

    Raises:
        ConfigError: it cannot be read, is too large for a tokenizer, or is not JSON.
    """
    try:
        content = files.read_bytes(pathlib.Path(path), _MOST_BYTES)
        return content, files.parse_json(content, memory=_MOST_MEMORY)
    except FileNotFoundError:
        raise _error(
            path, "no such file; it is the path of a tokenizer.json, 'tekken' or 'byte'"
        ) from None
    except OSError as error:
        raise _error(path, f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise _error(path, f"is not a tokenizer.json: {_first_line(error)}") from None


def _without_dropout(tokenizer: Any) -> tuple[str, ...]:
    """Switch a BPE's dropout off, because equal text must give equal ids, and return notes on it."""
    dropout = getattr(tokenizer.model, "dropout", None)
    if not dropout:
        return ()
    tokenizer.model.dropout = None
    return (f"its BPE dropout of {dropout:.3g} is switched off: equal text gives equal ids",)


def _check_lossless(path: str, tokenizer: Any, cause: str, **options: Any) -> None:
    try:
        lossless.check(tokenizer.encode, tokenizer.decode, tokenizer.token_bytes, **options)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the libraries' panics are not Exceptions
        raise _error(
            path,
            f"{_first_line(error)}{cause}; bits per byte would be wrong: use a byte-level "
            f"tokenizer that loses nothing, "
            "or 'byte'",
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _installed_tekken() -> str:
    """Return the path of the tekken.json of the package mistral-common, which need not be
    importable.
    """
    spec = importlib.util.find_spec("mistral_common")
    for directory in (spec.submodule_search_locations or []) if spec else []:
        path = pathlib.Path(directory) / "data" / "tekken_240718.json"
        if path.is_file():
            return str(path)
    raise _error(
        "tekken",
        "needs the package mistral-common; pip install --no-deps mistral-common, or give a "
        "tekken.json",
    )


def _is_tekken(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return b'"default_num_special_tokens"' in file.read(1 << 12)
    except OSError:
        return False


def _error(path: str, fault: str) -> ConfigError:
    return ConfigError(f"config.data.tokenizer: {path!r} {fault}")


def _checked(ids: Any, vocab_size: int) -> np.ndarray:
    ids = np.asarray(ids, np.int64).reshape(-1)
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(
            f"token ids from {ids.min()} to {ids.max()}; the tokenizer's are 0 to {vocab_size - 1}"
        )
    return ids
