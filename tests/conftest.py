"""Settings for every test: no network, idle threads that let others work, repeatable property tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Read by the libraries when they are imported, so they are set before any test module is.
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "WANDB_SILENT": "true",
}.items():
    os.environ.setdefault(_name, _value)

# A background job ignores Ctrl-C, under nohup the end of its terminal too; the processes that the tests start and
# interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

settings.register_profile("tristage", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("tristage")


@pytest.fixture(autouse=True)
def libraries_environment_kept() -> Iterator[None]:
    """A stage that runs inside a test tells accelerate what to do through the environment."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) | set(before):
        if name.startswith(("ACCELERATE_", "FSDP_")):
            os.environ.pop(name, None)
            os.environ.update({name: before[name]} if name in before else {})
