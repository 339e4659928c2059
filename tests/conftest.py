"""Shared by all tests: offline, one place for tiny models, a tokenizer, and runs of the project's
commands."""

import contextlib
import functools
import gc
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "true",
    # Tests run side by side; threads that wait for one another on tiny tensors take ten times as
    # long.
    "OMP_NUM_THREADS": "1",
}

import pytest
import torch
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from warm_python import run_script

from preflab.batching.examples import PreferenceData
from preflab.batching.token_store import prepare
from preflab.execution import register_built_in
from preflab.objective.registry import LOSSES, bind_loss
from preflab.readers.registry import open_dataset

ROOT = Path(__file__).resolve().parent.parent
register_built_in()
# Hydra's search for plugins makes its classes again, once. Tests that import subclasses of ours
# need those that stay.
Plugins.instance()


# The longest first, so that no worker has to wait for another one's long file at the end.
LONG_FILES = [
    "distributed",
    "online",
    "commands",
    "resume",
    "training",
    "plan",
    "api",
    "user_trainer",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


def pytest_collection_finish() -> None:
    """Leave what the imports have made out of every later search for unreachable objects. Runs ask
    for such searches, which would take a third of their time here."""
    gc.collect()
    gc.freeze()


def losses_to_run() -> list[str]:
    """The losses that whole commands are tried with: of those in pair_losses.py one for each set of
    inputs that no other has, since what differs besides is a function of tensors, tested as one.
    """
    seen, names = set(), []
    for name in sorted(LOSSES, key=lambda n: LOSSES[n].function.__module__ == "pair_losses"):
        config = OmegaConf.load(ROOT / "config" / "loss" / f"{name}.yaml")
        loss = bind_loss(OmegaConf.to_container(config))
        inputs = (loss.examples, loss.reads, loss.columns, loss.couples_batch)
        if LOSSES[name].function.__module__ != "pair_losses" or inputs not in seen:
            names.append(name)
        seen.add(inputs)
    return sorted(names)


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
YARN |= {"original_max_position_embeddings": 64}
LOCAL_GLOBAL = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}

# Small enough to run in milliseconds, and every architecture of the published recipes is there.
# The name is the model_type unless the sizes have one: kinds of one architecture.
ARCHITECTURES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "gpt_neox": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    },
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    },
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "rotary_dim": 8},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 16,
        "max_position_embeddings": 128,
        "intermediate_size": 64,
    },
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 64,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 16,
    },
    "phi": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    },
    "mistral": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "sliding_window": 16,
    },
    "qwen2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
    },
    "qwen3": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    },
    "phi3": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    },
    "olmo2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    },
    "gemma": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    },
    "gemma2": SMALL | LOCAL_GLOBAL | {"head_dim": 16, "attn_logit_softcapping": 5.0},
    "gemma3_text": SMALL | LOCAL_GLOBAL | {"head_dim": 16},
    "olmo3": SMALL | LOCAL_GLOBAL,
    "smollm3": SMALL | LOCAL_GLOBAL | {"use_sliding_window": True, "no_rope_layers": [1, 0]},
    "granite": SMALL | {"logits_scaling": 2.0, "residual_multiplier": 0.7},
    "cohere2": SMALL | LOCAL_GLOBAL | {"logit_scale": 0.25},
    "stablelm": SMALL | {"use_parallel_residual": True, "qk_layernorm": True},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "falcon_40b": {
        "model_type": "falcon",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
    },
    "falcon_rw": {
        "model_type": "falcon",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 128},
    "mixtral": SMALL | {"sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": SMALL
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    | {"shared_expert_intermediate_size": 32, "use_sliding_window": True, "sliding_window": 16}
    | {"max_window_layers": 1},
    "qwen3_moe": SMALL
    | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "olmoe": SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 8.0},
    # Not in SHARING: the first passes its trial, the second has convolutions over the row.
    "starcoder2": SMALL | {"sliding_window": 16},
    "lfm2": SMALL | {"layer_types": ["conv", "full_attention"]},
    "gpt_oss": SMALL
    | LOCAL_GLOBAL
    | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": YARN},
}


# Those whose weights are named and tied as another's here: tests of files leave them out.
NAMED_AS_ANOTHER = {"cohere2", "falcon_40b", "falcon_rw", "gemma2", "gemma3_text", "granite"}
NAMED_AS_ANOTHER |= {"lfm2", "olmo3", "olmoe", "qwen3_moe", "smollm3", "stablelm", "starcoder2"}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens: 256 of them, then <|endoftext|> (BOS and EOS) and <|pad|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )


def make_model(
    architecture: str, *, seed: int = 0, dtype=torch.float32, scale: float = 4.0
) -> torch.nn.Module:
    """A random model; its weights are scaled up so that its distributions are far from uniform."""
    torch.manual_seed(seed)
    sizes = {"model_type": architecture, **ARCHITECTURES[architecture]}
    config = AutoConfig.for_model(
        **sizes, vocab_size=258, bos_token_id=256, eos_token_id=256, pad_token_id=257
    )
    if dtype == torch.float64:
        config._experts_implementation = "eager"  # torch's grouped products have no float64
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for _name, p in model.named_parameters():
            if p.ndim > 1:
                p.mul_(scale)
    return model


@functools.cache
def architecture_of(block_name: str) -> str:
    """The architecture of ARCHITECTURES whose blocks are of this class, a model's `block_name`."""
    for architecture in ARCHITECTURES:
        if any(type(m).__name__ == block_name for m in make_model(architecture).modules()):
            return architecture
    raise AssertionError(f"no architecture in tests/conftest.py has blocks of {block_name}")


def save_model(folder: Path, architecture: str = "llama", **options) -> Path:
    """A model folder with its tokenizer, as `model.name_or_path` takes it."""
    make_model(architecture, **options).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama")


def scored_rows(n_prompts: int = 12, k: int = 4) -> list[dict]:
    """Rows of the imdb format; the reward grows with the number of `!`."""
    return [
        {
            "prompt": f"prompt number {i}",
            "text": f" answer {j} of {i}" + "!" * ((j + i) % k),
            "reward": 0.25 + (j + i) % k / 2,
        }
        for i in range(n_prompts)
        for j in range(k)
    ]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tokenised(folder: Path, rows: list[dict], *, lists: bool = False) -> PreferenceData:
    """Rows of a user's own data, tokenised by `make_tokenizer`, as pairs or as lists."""
    for split in ("train", "test"):
        write_jsonl(folder / "data" / f"{split}.jsonl", rows)
    source = open_dataset(str(folder / "data"), "train", lists=lists)
    limits = {"max_length": 64, "max_prompt_length": 32, "cache_dir": folder / "cache"}
    store = prepare(source, make_tokenizer(), **limits)
    return PreferenceData([store], "lists" if lists else "pairs", "data")


def write_imdb(folder: Path) -> Path:
    """Write the files of datasets=[imdb]; returns `folder`, for data_dir."""
    for split, n in (("train", 24), ("test", 8)):
        write_jsonl(folder / f"imdb-sft-{split}.jsonl", scored_rows(n))
    return folder


@pytest.fixture
def imdb_dir(tmp_path) -> Path:
    """A data folder with the files of datasets=[imdb]."""
    return write_imdb(tmp_path / "data")


def small_run(folder: Path, data_dir: Path, run_dir: Path, *more: str) -> list[str]:
    """Overrides of a run that takes a second."""
    settings = {
        "model": "blank_model",
        "model.name_or_path": folder,
        "datasets": "[imdb]",
        "data_dir": data_dir,
        "local_run_dir": run_dir,
        "cache_dir": data_dir.parent / "cache",
        "batch_size": 8,
        "eval_batch_size": 8,
        "n_eval_examples": 8,
        "n_eval_model_samples": 4,
        "max_length": 64,
        "max_prompt_length": 32,
        "max_new_tokens": 8,
        "lr": 1e-3,
        "warmup_steps": 2,
        "eval_every": 16,
        "wandb.enabled": "false",
    }
    given = {o.split("=")[0] for o in more}
    return [f"{key}={value}" for key, value in settings.items() if key not in given] + list(more)


def run_command(
    script: str, *arguments, check: bool = True, **options
) -> subprocess.CompletedProcess:
    """Run `python SCRIPT ARGUMENTS` in the repository as a user would.

    options: of subprocess.run, for a command whose environment or streams matter. Without them, the
    command runs in a fork that has imported what it needs.
    """
    command = [str(ROOT / script), *map(str, arguments)]
    if options:
        result = subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=600,
            **options,
        )
    else:
        result = run_script(command, cwd=ROOT, timeout=600)
    if check and result.returncode != 0:
        raise AssertionError(
            f"{script} failed with {result.returncode}\n{result.stdout}\n{result.stderr}"
        )
    return result


def run_on_ranks(n: int, folder: Path, commands: list[list[str]]) -> None:
    """Run train.py's commands one after the other on `n` ranks, which are started once; folder:
    for a file."""
    path = folder / "commands.json"
    path.write_text(json.dumps([[str(word) for word in command] for command in commands]))
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    result = subprocess.run(
        [sys.executable, "-m", *torchrun, str(ROOT / "tests" / "many_runs.py"), str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-5000:]


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def run_here(*overrides: str) -> dict:
    """Run train.py's command in this process and return its summary; its errors are raised.

    Its report has no pictures, which would take longer than the run: `make_pictures` makes them,
    and commands that tests start draw them.
    """
    import hydra
    from omegaconf import OmegaConf

    from preflab import execution
    from preflab.reports import run
    from preflab.settings.keys import CONFIG_DIR
    from preflab.settings.run_folder import register_resolvers

    OmegaConf.clear_resolvers()
    register_resolvers()
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = hydra.compose("config", overrides=list(overrides))
    with mock.patch.object(run, "_figures", lambda _: {}):
        return execution.execute(config, Path(config.local_run_dir))


def make_pictures(run_dir: Path) -> None:
    """Make the pictures of a run's report without drawing them."""
    from preflab.reports.run import Run, _figures

    assert any(figure for _, figure in _figures(Run(run_dir)).values())


@pytest.fixture
def run(imdb_dir, llama_folder, tmp_path):
    """Run with some overrides in a new folder; returns the folder."""

    def run(name: str, *overrides: str) -> Path:
        run_here(*small_run(llama_folder, imdb_dir, tmp_path / name, *overrides))
        return tmp_path / name

    return run


def saved_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    state = {}
    for path in sorted((checkpoint / "hf").glob("*.safetensors")):
        state |= load_file(path)
    assert state, f"{checkpoint} holds no weights"
    return state


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return saved_weights(run_dir / "LATEST")


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def untimed(rows: list[dict]) -> list[dict]:
    """Metric rows without what depends on the clock."""
    return [
        {key: value for key, value in row.items() if not key.endswith("_per_second")}
        for row in rows
    ]


class ServerForMany(ThreadingHTTPServer):
    """The queue of the standard library holds five connections, and more at once may be reset."""

    request_queue_size = 128


@pytest.fixture
def http_server():
    """Starts servers that answer requests with `answers`, in order; the last answer is also that
    of all further ones.

    An answer: a status, "drop" (the connection), "stall", "drip" (a byte at a time), "nonsense", or
    a function from the body to an answer, or to a status and an answer.
    """
    servers = []

    def start(answers: list):
        received, lock = [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    answer = answers[min(len(received), len(answers) - 1)]
                    received.append(body)
                if answer == "drop":
                    self.connection.close()
                    return
                if answer == "stall":
                    time.sleep(3)
                    return
                content = b"<html>no JSON</html>"
                status = answer if isinstance(answer, int) else 200
                if callable(answer):
                    made = answer(body)
                    status, made = made if isinstance(made, tuple) else (200, made)
                    content = json.dumps(made).encode()
                self.send_response(status)
                self.end_headers()
                with contextlib.suppress(OSError):
                    if answer == "drip":
                        for _ in range(40):
                            self.wfile.write(b" ")
                            time.sleep(0.1)
                    self.wfile.write(content)

            def log_message(self, *args):
                pass

        server = ServerForMany(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        server.url, server.received = f"http://127.0.0.1:{server.server_port}", received
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# ------------------------------------------------------------------------------------ damaged files


def cut(path):
    path.write_bytes(path.read_bytes()[:-4])


def empty(path):
    path.write_bytes(b"")


def delete(path):
    path.unlink()


def change(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
