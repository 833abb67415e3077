"""Load weights and tokenizer from a hub id or a folder: safetensors only, never code from a checkpoint, one clear line on failure."""

import importlib
import importlib.util
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging
from transformers.utils.hub import cached_file

from reasonscope.data.errors import InputError, MissingExtraError, ModelLoadError, ReasonscopeError
from reasonscope.data.progress import working
from reasonscope.data.variants import Quantise
from reasonscope.probes.architecture.shrinking import class_for
from reasonscope.probes.models.packing import bitsandbytes_config

# The models that come with the package.
SHIPPED = ("organism", "organism-base")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ADAPTER = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
# The token embedding among the weights of an adapter, by the names that families of transformers give it; not a low-rank part of it.
_EMBEDDING = re.compile(r"\.(embed_tokens|wte|embed_in|word_embeddings)(\.modules_to_save)?\.weight$")
# How accelerate may spread a model over the devices of this machine.
_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def load_pretrained(
    source: str,
    *,
    device: str | Mapping[str, Any],
    dtype: str | torch.dtype | None,
    revision: str | None,
    quantise: Quantise | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model on `device`, and its tokenizer, from a hub id or folder of a model or an adapter, or from a GGUF file.

    Raises ModelLoadError, MissingExtraError for a kind of file that needs a package which is not installed, or InputError for a device that
    does not exist.
    """
    place = locate(source)
    if isinstance(device, str) and device not in _STRATEGIES:
        _check_device(device)
    if isinstance(place, Path) and place.suffix == ".gguf":
        return _load_gguf(place, device=_of_gguf(place, device, quantise), dtype=dtype)
    if adapter := _find_adapter(place, revision):
        return _load_adapter(adapter, device=device, dtype=dtype, quantise=quantise)
    if isinstance(place, Path):
        _check_folder(place)
    with _foreign(source), _shown(source):
        _check_kernels(place, revision)
        tokenizer = _load_tokenizer(place, revision)
        config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
        # With output_loading_info it returns a pair, although its annotations do not say so.
        loaded: Any = class_for(config).from_pretrained(
            place,
            revision=revision,
            dtype=dtype or "auto",
            device_map=_device_map(device, config, quantise),
            **_quantisation(quantise, dtype, config),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    return _complete(source, loaded, device), tokenizer


def _complete(
    source: str, loaded: tuple[PreTrainedModel, Mapping[str, Any]], device: str | Mapping[str, Any]
) -> PreTrainedModel:
    """The model on its device, if the checkpoint had all its weights. Raises ModelLoadError."""
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelLoadError(
            f"{source} lacks {len(missing)} weights, the first of which is {missing[0]}; transformers would fill them with random "
            "numbers. Download the checkpoint again"
        )
    if getattr(model, "hf_device_map", None) or not isinstance(device, str):
        return model
    with _foreign(source):  # it may not fit
        moved: PreTrainedModel = model.to(torch.device(device))  # type: ignore[arg-type]  # annotated as if it were a model itself
    return moved


def _check_device(device: str) -> None:
    """Raise InputError for a device that torch cannot use on this machine, before anything is loaded."""
    try:
        torch.empty(0, device=device)
    except Exception as error:  # the kind of error depends on the device and on how torch was built
        raise InputError(
            f"torch {torch.__version__} cannot use the device {device!r} on this machine ({_one_line(error)[:200]}); give cpu, one that "
            "it has (such as cuda or cuda:1), or auto to spread the model over all"
        ) from error


def _device_map(device: str | Mapping[str, Any], config: PretrainedConfig, quantise: Quantise | None) -> Any:
    """What transformers takes: a strategy of accelerate, a device for each module, or the device of a quantised model."""
    if not isinstance(device, str):
        return dict(device)
    if device in _STRATEGIES:
        return device
    packed = quantise is not None or getattr(config, "quantization_config", None) is not None
    return {"": device} if packed else None  # a plain model on one device does not need accelerate


def _quantisation(
    quantise: Quantise | None, dtype: str | torch.dtype | None, config: PretrainedConfig
) -> dict[str, BitsAndBytesConfig]:
    """The argument for transformers, which takes None for "read packed weights as if they were not"."""
    if quantise is None:
        return {}
    wanted = dtype or config.dtype or "float32"
    kind: torch.dtype = getattr(torch, wanted, torch.float32) if isinstance(wanted, str) else wanted
    return {"quantization_config": bitsandbytes_config(quantise, kind)}


def _of_gguf(file: Path, device: str | Mapping[str, Any], quantise: Quantise | None) -> str:
    """The device of a GGUF file. Raises InputError for what its weights cannot do: they are unpacked while they are read."""
    if quantise is not None:
        raise InputError(
            f"{file} is unpacked while it is read, and not packed again; leave out quantise={quantise!r} (--quantise)"
        )
    if not isinstance(device, str) or device in _STRATEGIES:
        raise InputError(f"{file} is loaded onto one device; give cpu or cuda:0, say, and not {device!r} (--device)")
    return device


def _load_gguf(
    file: Path, *, device: str, dtype: str | torch.dtype | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model and tokenizer of a GGUF file. Its weights are unpacked to `dtype`, by default float32."""
    with _foreign(str(file)), _shown(str(file)):
        config, tokenizer = _gguf_words(file)
        loaded: Any = class_for(config).from_pretrained(
            file.parent,
            dtype=dtype or torch.float32,
            output_loading_info=True,
            gguf_file=file.name,
            trust_remote_code=False,
        )
    return _complete(str(file), loaded, device), tokenizer


def _gguf_words(file: Path) -> tuple[PretrainedConfig, PreTrainedTokenizerFast]:
    """The configuration and the tokenizer of a GGUF file. Raises ModelLoadError, or MissingExtraError without gguf."""
    if not file.is_file():
        raise ModelLoadError(f"{file} is not a file")
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError(f'{file.name} needs the gguf package: pip install "reasonscope[gguf]"')
    given = {"gguf_file": file.name, "trust_remote_code": False}
    with _foreign(str(file)):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **given)
        return AutoConfig.from_pretrained(file.parent, **given), fast(tokenizer, str(file))


@dataclass(frozen=True, kw_only=True)
class _Adapter:
    """A PEFT adapter: its name, the folder with its files, and the name and revision of its base model."""

    name: str
    folder: Path
    base: str
    base_revision: str | None

    @property
    def has_tokenizer(self) -> bool:
        """Whether it brings a tokenizer of its own, as training with new tokens or another chat template leaves one."""
        return (self.folder / "tokenizer.json").is_file()


def _find_adapter(place: Path | str, revision: str | None) -> _Adapter | None:
    """The adapter in a folder or hub repository; None without one. Raises ModelLoadError if it names no base or is pickled."""
    with _foreign(str(place)):
        told = _cached(place, _ADAPTER, revision)
        if told is None:
            return None
        fields = json.loads(told.read_text(encoding="utf-8"))
        base = fields.get("base_model_name_or_path")
        weights = _cached(place, _ADAPTER_WEIGHTS, revision)
        _cached(place, "tokenizer.json", revision)
    if not isinstance(base, str) or not base:
        raise ModelLoadError(f"{told} names no base model; add base_model_name_or_path")
    if weights is None:
        raise ModelLoadError(f"{place} has no {_ADAPTER_WEIGHTS}; pickled weights are never loaded")
    return _Adapter(name=str(place), folder=weights.parent, base=base, base_revision=fields.get("revision"))


def is_adapter(source: str) -> bool:
    """Whether a folder or hub repository holds a PEFT adapter; one that cannot be reached counts as a model."""
    try:
        with _foreign(source):
            return _cached(locate(source), _ADAPTER, None) is not None
    except ModelLoadError:
        return False


def _cached(place: Path | str, file: str, revision: str | None) -> Path | None:
    """The place of a file of a folder or hub repository on this machine, after a download if need be; None if it does not exist."""
    if isinstance(place, Path) and not (place / file).is_file():
        return None
    found = cached_file(place, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _load_adapter(
    adapter: _Adapter, *, device: str | Mapping[str, Any], dtype: str | torch.dtype | None, quantise: Quantise | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The base model of a PEFT adapter with the adapter merged into its weights, and the adapter's tokenizer or else the base's.

    Raises MissingExtraError without peft.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError(f'{adapter.name} is an adapter, which needs peft: pip install "reasonscope[adapters]"')
    model, tokenizer = load_pretrained(
        adapter.base, device=device, dtype=dtype, revision=adapter.base_revision, quantise=quantise
    )
    peft = importlib.import_module("peft")  # not at the top: it is an extra
    with _foreign(adapter.name):
        if adapter.has_tokenizer:
            tokenizer = _load_tokenizer(adapter.folder, None)
        if rows := _trained_rows(adapter.folder / _ADAPTER_WEIGHTS):
            model.resize_token_embeddings(rows, mean_resizing=False)
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft's calls, which no user can change
            merged = peft.PeftModel.from_pretrained(model, adapter.folder).merge_and_unload()
    merged.config.name_or_path = adapter.name
    return merged, tokenizer


def _trained_rows(weights: Path) -> int | None:
    """The rows of the token embedding that an adapter brings; None if it leaves the base's as it is."""
    with safe_open(str(weights), framework="pt") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys() if _EMBEDDING.search(key)]  # noqa: SIM118
    return next((shape[0] for shape in shapes if len(shape) == 2), None)


def load_words(source: str, revision: str | None) -> tuple[PretrainedConfig, PreTrainedTokenizerFast]:
    """The configuration and the tokenizer of anything that `load_pretrained` takes, without weights."""
    place = locate(source)
    if isinstance(place, Path) and place.suffix == ".gguf":
        return _gguf_words(place)
    if adapter := _find_adapter(place, revision):
        config, tokenizer = load_words(adapter.base, adapter.base_revision)
        return config, _load_tokenizer(adapter.folder, None) if adapter.has_tokenizer else tokenizer
    with _foreign(source):
        config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
        return config, _load_tokenizer(place, revision)


def load_structure(
    source: str, *, dtype: str | torch.dtype | None, revision: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The modules of a model without weights (on the "meta" device), and its tokenizer: for an engine on another machine."""
    place = locate(source)
    with _foreign(source):
        _check_kernels(place, revision)
        config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
        with torch.device("meta"):
            hf = class_for(config).from_config(config, dtype=dtype or config.dtype, trust_remote_code=False)
        return hf, _load_tokenizer(place, revision)


@contextmanager
def _shown(source: str) -> Iterator[None]:
    """Inside, a terminal shows the bars of transformers (of a download, too); anywhere else they would be noise, and are off."""
    terminal = sys.stderr.isatty()
    asked_for = "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ  # which has the last word with transformers, too
    quiet = not terminal and not asked_for and logging.is_progress_bar_enabled()
    if quiet:
        logging.disable_progress_bar()
    try:
        with working(f"loading {source}", shown_elsewhere=terminal):
            yield
    finally:
        if quiet:
            logging.enable_progress_bar()


@contextmanager
def _foreign(source: str) -> Iterator[None]:
    """A context that turns every error but our own into a ModelLoadError that names `source`.

    Use it only for calls of transformers that read files from others, which can make it fail anywhere.
    """
    try:
        yield
    except ReasonscopeError:
        raise
    except ImportError as error:  # a kind of quantisation whose package is missing; transformers names it
        raise MissingExtraError(
            f"cannot load {source!r}, which needs a package that is not installed: {_one_line(error)[:300]}"
        ) from error
    except Exception as error:
        raise ModelLoadError(_reason(source, error)) from error


def _load_tokenizer(place: Path | str, revision: str | None) -> Any:
    """The tokenizer exactly as its tokenizer.json describes it; AutoTokenizer only if that file is missing.

    Since transformers 5, AutoTokenizer rebuilds the tokenizer as the class that is registered for the architecture, with different
    pre-tokenization (huggingface/transformers#45488, #45920: R1 distillations, OLMo 2, Yi). Prompts would become other tokens than
    those that the model was trained on.
    """
    if cached_file(place, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False):
        return PreTrainedTokenizerFast.from_pretrained(place, revision=revision or "main")
    return AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)


def generation_defaults(source: str, revision: str | None = None) -> dict[str, Any]:
    """The fields of `Sampling` that the model's own generation configuration sets. Raises ModelLoadError, InputError without one."""
    place = locate(source)
    if adapter := _find_adapter(place, revision):
        return generation_defaults(adapter.base, adapter.base_revision)
    with _foreign(source):
        try:
            config = GenerationConfig.from_pretrained(place, revision=revision or "main")
        except OSError as error:
            raise InputError(
                f"{source} has no generation_config.json; give the fields, such as --temperature 0.6 --top-p 0.95"
            ) from error
    greedy = config.do_sample is False or config.do_sample is None
    names = ("repetition_penalty",) if greedy else ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    found = {name: value for name in names if (value := getattr(config, name, None)) is not None}
    return {**found, "temperature": 0.0} if greedy else {"temperature": 1.0, **found}


def fast(tokenizer: Any, name: str) -> PreTrainedTokenizerFast:
    """`tokenizer`, if it is a fast one, which knows where its tokens begin and end. Raises InputError otherwise."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(
            f"the tokenizer of {name} is a {type(tokenizer).__name__}; a fast tokenizer is needed, one with offsets"
        )
    return tokenizer


def locate(source: str) -> Path | str:
    """What a name stands for: the folder of a shipped model, a folder, or the name itself as a hub id."""
    if source in SHIPPED:
        return Path(str(files("reasonscope.data.organism"))) / source
    if Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        return Path(source).expanduser()
    return source


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelLoadError(f"{folder} is not a folder; give a hub id, a model folder, {' or '.join(SHIPPED)}")
    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"{folder} has no config.json, so it is not a model folder")
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelLoadError(
            f"{folder} holds its weights as {', '.join(pickles)}: such files are pickles, which can run code when they are read. "
            "Only safetensors are loaded; if you trust the files, convert them (save_pretrained writes safetensors)"
        )
    raise ModelLoadError(f"{folder} has no weights; it needs a model.safetensors")


def _check_kernels(place: Path | str, revision: str | None) -> None:
    """Raise ModelLoadError if the configuration names a kernel on the hub, which transformers would fetch and run."""
    config, _ = PretrainedConfig.get_config_dict(place, revision=revision)
    for key, value in _entries(config):
        if key.endswith("_implementation") and "/" in str(value):
            raise ModelLoadError(
                f"{place} asks for {key} {value!r:.60}, which is code from the hub. It could do anything on this machine, so it is "
                "never run. Remove the entry from its config.json"
            )


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value in nested JSON."""
    if isinstance(value, Mapping):
        yield from value.items()
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _entries(inner)


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()


def _reason(source: str, error: Exception) -> str:
    text = _one_line(error)
    if "trust_remote_code" in text:
        return (
            f"{source} comes with its own code, which could do anything on this machine, so it is never run (trust_remote_code is "
            "off). Use an architecture that transformers knows, or load the model yourself and pass the PreTrainedModel"
        )
    if "safetensors" in text and "pytorch_model.bin" in text:
        return f"{source} has no safetensors; pickled weights are never loaded, because they can run code. {text[:200]}"
    return f"cannot load {source!r}: {type(error).__name__}: {text[:300]}"
