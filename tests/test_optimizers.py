"""Optimizers: their arguments and defaults, which weights decay, Muon, and exact resuming."""

import copy
import textwrap
from types import SimpleNamespace

import pytest
import torch
from conftest import final_weights, make_model, read_rows, run_here, same_weights, small_run

from preflab.modeling.logprobs import Scorer
from preflab.modeling.parallelism import Placement
from preflab.training.muon import MuonAndAdamW
from preflab.training.optimizer_state import load_optimizer, save_optimizer
from preflab.training.optimizers import check_optimizer, make_optimizer, state_slots
from utils import ConfigError

SHARDED, SPLIT = Placement(shards_state=True), Placement(splits_layers=True)


def settings(optimizer="RMSprop", on="matrices", **args) -> SimpleNamespace:
    return SimpleNamespace(
        optimizer=str(optimizer),
        optimizer_args=args,
        weight_decay_on=on,
        lr=1e-2,
        trainer="FSDPTrainer",
        tensor_parallel_size=1,
        fsdp_cpu_offload=False,
    )


def step(scorer: Scorer, optimizer) -> None:
    """A step on gradients that are a function of the weights' names."""
    for i, p in enumerate(scorer.model.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    optimizer.step()


def weights_after(make, n=2) -> dict[str, torch.Tensor]:
    scorer = Scorer(make_model("llama"))
    optimizer = make(scorer)
    for _ in range(n):
        step(scorer, optimizer)
    return {name: p.detach().clone() for name, p in scorer.model.named_parameters()}


@pytest.mark.parametrize("name", ["RMSprop", "Adam", "SGD", "Adagrad"])
def test_without_arguments_an_optimizer_is_that_of_torch_with_a_learning_rate(name):
    """RMSprop with lr alone is what the code of DPO trains with."""
    ours = weights_after(lambda scorer: make_optimizer(settings(name), scorer)[0])
    cls, fused = getattr(torch.optim, name), name != "RMSprop"
    theirs = weights_after(
        lambda scorer: cls(scorer.model.parameters(), lr=1e-2, **({"fused": True} if fused else {}))
    )
    assert same_weights(ours, theirs)


@pytest.mark.parametrize(
    "optimizer, given, on, decayed",
    [
        ("AdamW", {}, "matrices", "none"),  # torch's own default is 0.01 on all
        ("AdamW", {"weight_decay": 0.1}, "matrices", "matrices"),
        ("AdamW", {"weight_decay": 0.1}, "all", "all"),
        ("Muon", {}, "matrices", "none"),
        ("Muon", {"weight_decay": 0.1}, "matrices", "matrices"),
        ("Muon", {"weight_decay": 0.1}, "all", "all"),
        ("Muon", {"weight_decay": 0.1, "adamw": {"weight_decay": 0.0}}, "all", "layers"),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_decays(architecture, optimizer, given, on, decayed):
    scorer = Scorer(make_model(architecture, scale=1.0))
    for p in scorer.model.parameters():
        p.data.fill_(1.0)
        p.grad = torch.zeros_like(p)
    made, names = make_optimizer(settings(optimizer, on, **given), scorer)
    assert sorted(names) == sorted(dict(scorer.model.named_parameters()))
    made.step()
    shrunk = {name for name, p in scorer.model.named_parameters() if not bool((p == 1).all())}
    everything = set(names)
    embeddings = {name for name in everything if any(w in name for w in ("embed", "wte", "wpe"))}
    matrices = {n for n, p in scorer.model.named_parameters() if p.ndim > 1} - embeddings
    layers = {name for name in matrices if ".0." in name or ".1." in name}
    assert layers < everything and embeddings
    expected = {"none": set(), "matrices": matrices, "all": everything, "layers": layers}
    assert shrunk == expected[decayed]


def test_muon_is_torchs_on_matrices_inside_and_adamw_on_the_rest():
    def theirs(scorer):
        named = dict(scorer.model.named_parameters())
        inside = [n for n, p in named.items() if ".layers." in n and p.ndim == 2]
        rest = [p for n, p in named.items() if n not in inside]
        muon = torch.optim.Muon(
            [named[n] for n in inside],
            lr=1e-2,
            weight_decay=0,
            momentum=0.9,
            adjust_lr_fn="match_rms_adamw",
        )
        adamw = torch.optim.AdamW(rest, lr=1e-2, weight_decay=0, betas=(0.5, 0.9), fused=True)
        return SimpleNamespace(step=lambda: (muon.step(), adamw.step()))

    given = {"momentum": 0.9, "adamw": {"betas": [0.5, 0.9]}}
    ours = weights_after(lambda scorer: make_optimizer(settings("Muon", **given), scorer)[0])
    assert same_weights(ours, weights_after(theirs))


@pytest.mark.parametrize(
    "name, given",
    [("AdamW", {"weight_decay": 0.1}), ("Muon", {"weight_decay": 0.1}), ("SGD", {"momentum": 0.9})],
)
def test_the_state_of_several_groups_is_read_as_it_was_saved(tmp_path, name, given):
    first, second = (Scorer(make_model("gpt2")) for _ in range(2))
    (saved, names), (loaded, _) = (
        make_optimizer(settings(name, **given), scorer) for scorer in (first, second)
    )
    step(first, saved)
    state, write = save_optimizer(saved, names, tmp_path / "optimizer")
    state = copy.deepcopy(state)  # a checkpoint does not share tensors
    slots = [value for of_one in saved.state.values() for value in of_one.values()]
    before = [(value, value.clone()) for value in slots if isinstance(value, torch.Tensor)]
    for value, _ in before:
        value.zero_()  # what is written is a snapshot
    write()
    for value, content in before:
        value.copy_(content)
    second.model.load_state_dict(first.model.state_dict())
    load_optimizer(loaded, names, tmp_path / "optimizer", state, alone=True)
    for scorer, optimizer in ((first, saved), (second, loaded)):
        step(scorer, optimizer)
    assert same_weights(first.model.state_dict(), second.model.state_dict())
    groups = [{k: v for k, v in g.items() if k != "params"} for g in saved.param_groups]
    assert groups == [{k: v for k, v in g.items() if k != "params"} for g in loaded.param_groups]


def test_a_state_of_one_group_of_an_earlier_version_is_read(tmp_path):
    weight = torch.nn.Parameter(torch.ones(3))
    earlier, now = torch.optim.AdamW([weight], lr=0.5), torch.optim.AdamW([weight], weight_decay=0)
    weight.grad = torch.ones(3)
    earlier.step()
    state, write = save_optimizer(earlier, ["w"], tmp_path / "optimizer")
    write()
    state["settings"] = state.pop("groups")[0]
    load_optimizer(now, ["w"], tmp_path / "optimizer", state, alone=True)
    assert now.param_groups[0]["weight_decay"] == 0.01  # such a run goes on as it began


RESUMED = {
    "adamw": ("optimizer=AdamW", "optimizer_args={betas: [0.8, 0.9], weight_decay: 0.1}"),
    "muon": ("optimizer=Muon", "optimizer_args={weight_decay: 0.1}"),
    "muon sharded": ("optimizer=Muon", "trainer=FSDPTrainer"),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_same_run(imdb_dir, llama_folder, tmp_path, name):
    def run(folder, n_examples):
        more = ("sample_during_eval=false", "pairing=all", f"n_examples={n_examples}", "n_epochs=2")
        run_here(*small_run(llama_folder, imdb_dir, tmp_path / folder, *more, *RESUMED[name]))
        return tmp_path / folder

    whole = run("whole", 48)
    run("broken", 24)
    assert same_weights(final_weights(run("broken", 48)), final_weights(whole))
    rates = {row["lr"] for row in read_rows(whole / "metrics.jsonl") if row["split"] == "train"}
    assert max(rates) == 1e-3


def test_muon_over_shards_is_torchs_on_the_whole_matrix():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from preflab.distributed.process_group import join_alone

    join_alone()
    mesh = init_device_mesh("cpu", (1,))
    start, gradient = torch.randn(7, 5), torch.randn(7, 5)
    plain = torch.nn.Parameter(start.clone())
    sharded = torch.nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)]))
    optimizers = [MuonAndAdamW([{"params": [p]}], lr=0.1) for p in (plain, sharded)]
    for _ in range(3):
        plain.grad, sharded.grad = gradient, distribute_tensor(gradient, mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(sharded.full_tensor(), plain)
    buffers = [
        o.state[p]["momentum_buffer"] for o, p in zip(optimizers, (plain, sharded), strict=True)
    ]
    assert buffers[1].placements == sharded.placements
    assert torch.equal(buffers[1].full_tensor(), buffers[0])


# ---------------------------------------------------------------------------------- other packages


@pytest.fixture
def own_file(tmp_path):
    path = tmp_path / "my_optimizers.py"
    path.write_text(
        textwrap.dedent(
            """
            import torch


            class Sign(torch.optim.Optimizer):
                def __init__(self, params, lr, scale=1.0):
                    if scale < 0:
                        raise ValueError(f"a scale of {scale}")
                    super().__init__(params, {"lr": lr, "scale": scale})

                @torch.no_grad()
                def step(self, closure=None):
                    for group in self.param_groups:
                        for p in group["params"]:
                            p -= group["lr"] * group["scale"] * p.grad.sign()


            class Named(Sign):
                def __init__(self, named_parameters, lr, weight_decay=0.5):
                    named = list(named_parameters)
                    assert all(isinstance(name, str) for name, _ in named)
                    super().__init__([p for _, p in named], lr)


            class Sized(Named):
                def __init__(self, named_parameters, lr, *, dim=2048, n_heads=32, n_kv_heads=None):
                    super().__init__(named_parameters, lr)
                    self.sizes = dim, n_heads, n_kv_heads


            class Rows(Sign):
                def step(self, closure=None):
                    super().step()
                    for group in self.param_groups:
                        for p in group["params"]:
                            self.state[p]["rows"] = p.grad.sum(-1)


            class ScheduleFree(Sign):
                def train(self):
                    pass

                def eval(self):
                    pass


            class NeedsClosure(Sign):
                def step(self, closure):
                    closure()


            NotOne = 3
            """
        )
    )
    return path


def test_an_optimizer_that_asks_for_sizes_of_the_model_gets_them(own_file):
    scorer = Scorer(make_model("llama"))  # of width 32, with two heads and one of keys and values
    chosen = settings(f"{own_file}:Sized")
    assert make_optimizer(chosen, scorer)[0].sizes == (32, 2, 1)
    chosen = settings(f"{own_file}:Sized", n_heads=1)
    assert make_optimizer(chosen, scorer)[0].sizes == (32, 1, 1)


def test_an_optimizer_of_your_own_file_trains(own_file):
    for name in ("Sign", "Named"):
        chosen = settings(f"{own_file}:{name}")
        check_optimizer(chosen, SHARDED)
        moved = weights_after(lambda scorer, chosen=chosen: make_optimizer(chosen, scorer)[0], 1)
        start = dict(make_model("llama").named_parameters())
        assert all(((moved[name] - p).abs() - 1e-2).abs().max() < 1e-6 for name, p in start.items())


@pytest.mark.parametrize(
    "name, given, placement, message",
    [
        ("RMSProp", {}, None, "did you mean RMSprop"),
        ("LBFGS", {}, None, "optimizer=LBFGS; "),
        ("torch.optim.AdmW", {}, None, "did you mean AdamW"),
        ("no_such_package.AdamW", {}, None, "optimizer='no_such_package' cannot be imported"),
        ("FILE:Nothing", {}, None, "has no optimizer Nothing"),
        ("FILE:NotOne", {}, None, "derived from"),
        ("FILE:ScheduleFree", {}, None, "trains one set of weights and is evaluated with another"),
        ("FILE:NeedsClosure", {}, None, "takes no step with optimizer_args={}: .*closure"),
        ("FILE:Sign", {"scale": -1.0}, None, "a scale of -1.0"),
        ("FILE:Sign", {"sclae": 1.0}, None, "has no argument sclae; did you mean scale"),
        ("AdamW", {"beta": 0.9}, None, "has no argument beta; did you mean betas"),
        ("AdamW", {"zzz": 0.9}, None, "accepted: amsgrad, betas, capturable, differentiable, eps"),
        ("AdamW", {"betas": [0.9, 2.0]}, None, "Invalid beta parameter at index 1"),
        ("AdamW", {"lr": 0.1}, None, "the learning rate is a separate setting; say lr=0.1"),
        ("SGD", {"betas": [0.9, 0.9]}, None, "optimizer=SGD has no argument betas"),
        ("Muon", {"adamw": {"beta": 1}}, None, "are arguments of AdamW: did you mean betas"),
        ("Muon", {"adamw": 3}, None, "optimizer_args.adamw=3 are arguments of AdamW"),
        ("Muon", {}, SPLIT, "needs each gradient as a whole matrix"),
        ("AdamW", {"weight_decay": 0.1}, SPLIT, "which would not decay; take weight_decay_on=all"),
        ("FILE:Rows", {}, SHARDED, r"not shaped as the weights are \(rows\)"),
        ("Adafactor", {}, SHARDED, "cannot shard"),
    ],
)
def test_what_cannot_be_used_is_refused(own_file, name, given, placement, message):
    chosen = settings(name.replace("FILE", str(own_file)), **given)
    with pytest.raises(ConfigError, match=message):
        check_optimizer(chosen, placement or Placement())


def test_the_plan_counts_the_state_of_both_parts_of_muon():
    model = make_model("llama")
    made, _ = make_optimizer(settings("Muon"), scorer := Scorer(model))
    step(scorer, made)
    tensors = [v for s in (made.state[p] for p in model.parameters()) for v in s.values()]
    numbers = sum(tensor.numel() for tensor in tensors if tensor.ndim)
    n = sum(p.numel() for p in model.parameters())
    assert state_slots(settings("Muon"), model) == pytest.approx(numbers / n)
    assert state_slots(settings("RMSprop"), model) == 1
