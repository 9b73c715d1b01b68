"""The memory estimate: kept bytes are predicted, more work never needs less, and chosen sizes fit the budget."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from gruppo.config.loading import RecipeError, load_recipe
from gruppo.config.sections import Lora
from gruppo.engines.memory import DEVICE_FRAGMENTS, FRAGMENTS, MODULE_FRAGMENTS, Free
from gruppo.errors import UsageError
from gruppo.models.footprint import Footprint, measure_footprint, prepared_bytes, process_bytes, saved_bytes
from gruppo.models.lora import add_adapters
from gruppo.models.packing import ACCELERATOR_TOKENS, MAX_TOKENS, pack
from gruppo.models.policy import LanguageModel
from gruppo.training.memory_estimate import (
    PHASES,
    EvalWorkload,
    Workload,
    choose_sizes,
    forecast_memory,
)
from gruppo.utils.progress import NullProgress
from gruppo.utils.system import free_memory
from tests.conftest import make_group, make_policy

CPU = torch.device("cpu")
WORK = Workload(prompt_tokens=40, max_tokens=30, prompts_per_step=20, group_size=8)
EVAL_SET = EvalWorkload("", questions=64, samples=1, question_tokens=50, answer_tokens=20, times=2)
ASKED = replace(WORK, eval_sets=(EVAL_SET,))


@pytest.fixture(scope="module")
def footprint() -> Footprint:
    return measure_footprint(make_policy(), process=1000, progress=NullProgress())


@pytest.mark.parametrize(
    ("text", "size"), [("6 GB", 6_000_000_000), ("5.5GiB", 5_905_580_032), ("300 MB", 300_000_000), ("7 KiB", 7168)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert Free.now(load_recipe({"model": {"name": "m"}, "run": {"memory": text}}).run.memory, CPU).budget == size


def test_a_share_refers_to_free_memory_plus_memory_of_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gruppo.engines.memory.free_memory", lambda _: 1000)
    monkeypatch.setattr("gruppo.engines.memory.process_bytes", lambda _: 200)
    assert Free.now(0.5, CPU).budget == 600


@pytest.mark.parametrize("value", [0, 1.5, -1, True, "6", "GB", "6 gb", "0 GB", "-1 GB", [1]])
def test_an_invalid_budget_names_field_value_and_fix(value: object) -> None:
    with pytest.raises(RecipeError, match=r"^recipe: run\.memory = .*: must be a .*; write e\.g\. memory = 0\.6$"):
        load_recipe({"model": {"name": "m"}, "run": {"memory": value}})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_bytes_are_predicted_exactly_from_a_few_short_trials(dtype: torch.dtype) -> None:
    policy = make_policy(dtype)
    footprint = measure_footprint(policy, 0, NullProgress())
    for layout in ([(21, [13] * 5)], [(30, [12] * 5), (9, [3] * 2)], [(50, [7] * 3)]):
        with policy.precision():
            exact = saved_bytes(policy, layout)
        unseen = prepared_bytes(policy)
        known = footprint.prepared - unseen + footprint.activations(layout, recompute=False)
        assert known == pytest.approx(exact, abs=2)


def test_kept_bytes_of_eager_attention_are_predicted_too() -> None:
    """Scores of tokens × tokens soon exceed everything else."""
    policy = _softcapped(replace(make_policy(), body=None))
    footprint = measure_footprint(policy, 0, NullProgress())
    layout = [(60, [20] * 6)]
    exact = saved_bytes(policy, layout)
    assert exact > 1.3 * saved_bytes(replace(make_policy(), body=None), layout)
    assert footprint.activations(layout, recompute=False) == pytest.approx(exact, abs=2)


def _softcapped(policy: LanguageModel) -> LanguageModel:
    for module in policy.model.modules():
        if hasattr(module, "layer_idx"):
            module.register_forward_pre_hook(lambda *args: (args[1], {**args[2], "softcap": 30.0}), with_kwargs=True)
    return policy


def test_kept_bytes_of_one_matmul_counted_by_hand() -> None:
    """Per MLP layer, gate and up are kept, [T, 48] in float32; everything else is recomputed from them."""
    layout = [(6, [5, 5])]
    wide, wider = (saved_bytes(make_policy(intermediate_size=size, num_hidden_layers=1), layout) for size in (48, 49))
    assert wider - wide == 2 * 16 * 4


def test_twice_the_layers_keep_twice_as_much(footprint: Footprint) -> None:
    twice, thrice = (
        measure_footprint(make_policy(num_hidden_layers=count), 0, NullProgress()).kept for count in (4, 6)
    )  # fmt: skip
    for one, two, three in zip(footprint.kept, twice, thrice, strict=True):
        assert two - one == pytest.approx(three - two, abs=1)
    assert twice[0] > 1.8 * footprint.kept[0]


def test_measuring_leaves_nothing_behind() -> None:
    """A graph that references its own outputs would never be freed; forty such graphs are 200 MB."""
    policy = make_policy(hidden_size=256, intermediate_size=512)
    layout = [(40, [20] * 3)]
    kept = saved_bytes(policy, layout)
    before = process_bytes(CPU)
    for _ in range(40):
        saved_bytes(policy, layout)
    assert process_bytes(CPU) - before < 10 * kept
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def test_weights_gradients_and_reference_are_counted(footprint: Footprint) -> None:
    policy = make_policy(torch.bfloat16)
    narrow = measure_footprint(policy, 0, NullProgress())
    size = sum(parameter.numel() for parameter in policy.model.parameters())
    embedding = policy.model.get_input_embeddings().weight.numel()
    norms = sum(parameter.numel() for parameter in policy.model.parameters() if parameter.ndim == 1)
    assert footprint.gradients == 4 * size
    assert 0 <= footprint.weights - 4 * size < 1000, "buffers are small"
    assert narrow.reference == narrow.weights - 2 * (size - embedding - norms)
    assert narrow.prepared == pytest.approx(2 * (size - norms), abs=2), "every matrix once in bfloat16"
    assert footprint.prepared == 2 * 4 * ((32 + 16 + 16) * 32 + 2 * 48 * 32), "what is stacked for one product"
    policy.model.get_input_embeddings().requires_grad_(False)
    assert measure_footprint(policy, 0, NullProgress()).gradients == 4 * (size - embedding)


def test_weights_merged_with_adapters_are_counted() -> None:
    """In float32, sampling computes with merged weights; in bfloat16, transformers' modules compute."""
    linear = 2 * ((32 + 16 + 16) * 32 + 32 * 32 + 3 * 48 * 32)
    for dtype, expected in ((torch.float32, 4 * linear), (torch.bfloat16, 0)):
        assert prepared_bytes(add_adapters(make_policy(dtype), Lora(rank=2), 0)) == expected


@pytest.mark.parametrize("field", ["prompt_tokens", "max_tokens", "group_size", "prompts_per_step", "samples",
                                   "question_tokens", "answer_tokens"])  # fmt: skip
def test_more_work_never_needs_less(footprint: Footprint, field: str) -> None:
    """With micro-batches of one completion; larger ones hold the same number of tokens for any lengths."""

    def longer(factor: int) -> Workload:
        if hasattr(EVAL_SET, field):
            return replace(WORK, eval_sets=(replace(EVAL_SET, **{field: getattr(EVAL_SET, field) * factor}),))
        return replace(ASKED, **{field: getattr(ASKED, field) * factor})

    sizes = [forecast_memory(footprint, longer(factor), 1, 40) for factor in (1, 2, 3)]
    for smaller, larger in pairwise(sizes):
        assert all(getattr(larger, phase) >= getattr(smaller, phase) for phase in PHASES)
    if field in {"prompt_tokens", "max_tokens"}:
        assert sizes[0].sampling < sizes[1].sampling
        assert sizes[0].training < sizes[1].training
    asked = forecast_memory(
        footprint, replace(WORK, eval_sets=(EVAL_SET, replace(EVAL_SET, answer_tokens=10**6))), 1, 40
    )
    assert asked.peak == asked.evaluation > max(asked.sampling, asked.training)
    if field.startswith(("question", "answer_")):
        assert sizes[0].evaluation < sizes[1].evaluation


def test_larger_sizes_and_a_reference_never_need_less(footprint: Footprint) -> None:
    peaks = [forecast_memory(footprint, WORK, tokens, 8).training for tokens in range(70, 1200, 10)]
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[-1]
    by_slots = [forecast_memory(footprint, WORK, 100, slots).sampling for slots in (1, 2, 8, 64)]
    assert by_slots == sorted(set(by_slots))
    kept, again = (forecast_memory(footprint, WORK, 512, 8, recompute).training for recompute in (False, True))
    assert again < kept
    alone, beside = (forecast_memory(footprint, replace(WORK, reference=each), 512, 8) for each in (False, True))
    assert beside.peak - alone.peak == footprint.reference


def test_a_step_in_one_micro_batch_has_no_gradients_in_addition_to_all_activations(footprint: Footprint) -> None:
    one = replace(WORK, prompts_per_step=1)
    assert forecast_memory(footprint, one, 1000, 8).gradients == 0
    assert forecast_memory(footprint, one, 200, 8).gradients >= footprint.gradients


@pytest.mark.parametrize("budget", [40, 69, 70, 71, 150, 300, 1024])
def test_the_layouts_are_those_that_packing_makes(budget: int) -> None:
    work = replace(WORK, prompts_per_step=3, group_size=4)
    groups = [make_group([1] * 40, [[2] * 30] * 4, [0.0, 1.0, 2.0, 3.0]) for _ in range(3)]
    for group in groups:
        group.trained, group.advantages = [True] * 4, [[1.0] * 30] * 4
    batches = pack(groups, lambda lengths: [[1.0] * len(each) for each in lengths], budget, with_kl=False)
    assert work.micro_batches(budget) == [batch.layout for batch in batches]


def test_a_long_prompt_is_computed_once_for_many_completions(footprint: Footprint) -> None:
    """In micro-batches of 1,024 tokens, a prompt of that length would be repeated for every completion."""
    long = Workload(prompt_tokens=1024, max_tokens=64, prompts_per_step=1, group_size=8)
    chosen = choose_sizes(footprint, long, 10**12)
    assert len(long.micro_batches(MAX_TOKENS)) == 8
    assert len(long.micro_batches(chosen.micro_batch_tokens)) == 1
    least = forecast_memory(footprint, long, long.smallest, 1, recompute=True).training
    assert choose_sizes(footprint, long, least).micro_batch_tokens == long.smallest


def test_the_chosen_sizes_are_the_largest_within_the_budget(footprint: Footprint) -> None:
    roomy = choose_sizes(footprint, ASKED, 10**12)
    assert (roomy.micro_batch_tokens, roomy.slots, roomy.recompute) == (MAX_TOKENS, 160, False)
    least = forecast_memory(footprint, ASKED, ASKED.smallest, 1)
    for budget in range(least.peak, roomy.memory.peak, max(1, (roomy.memory.peak - least.peak) // 17)):
        chosen = choose_sizes(footprint, ASKED, budget)
        assert chosen.memory == forecast_memory(footprint, ASKED, chosen.micro_batch_tokens, chosen.slots)
        assert chosen.memory.peak <= budget
        assert not chosen.recompute
        more = forecast_memory(footprint, ASKED, chosen.micro_batch_tokens + 1, chosen.slots + 1)
        assert chosen.micro_batch_tokens == MAX_TOKENS or more.training > budget
        assert chosen.slots == 160 or max(more.sampling, more.evaluation) > budget


def test_activations_are_recomputed_only_if_one_completion_does_not_fit_otherwise(footprint: Footprint) -> None:
    long = replace(WORK, prompt_tokens=400)
    least = forecast_memory(footprint, long, long.smallest, 1)
    assert least.training > max(least.sampling, 0)
    assert not choose_sizes(footprint, long, least.training).recompute
    tight = choose_sizes(footprint, long, least.training - 1)
    assert tight.recompute
    assert tight.memory.peak < least.training


def test_too_little_memory_reports_what_is_needed_and_what_to_change(footprint: Footprint) -> None:
    heavy = replace(footprint, gradients=3_000_000_000, moments=6_000_000_000)
    with pytest.raises(UsageError) as error:
        choose_sizes(heavy, WORK, 2_000_000_000)
    message = str(error.value)
    for words in (
        "run.memory",
        "allows 2.00 GB",
        "training needs at least 9.25 GB",
        "most of it for optimizer (6.00 GB)",
        '"9.3 GB"',
        "40 + 30 tokens",
        "sampling.max_tokens",
    ):
        assert words in message
    with pytest.raises(UsageError, match=r"sampling needs at least .* most of it for cache"):
        choose_sizes(replace(footprint, cache_token=10**9), WORK, 2_000_000_000)


def test_the_process_counts_on_a_cpu_and_only_its_tensors_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert process_bytes(CPU) > 100_000_000
    assert process_bytes(cuda) == 0
    # A device of 1,000 bytes: 600 are torch's, 250 of them in use; 100 belong to other programs.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 600)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 250)
    assert process_bytes(cuda) == 250
    assert free_memory(cuda) == 300 + (600 - 250)
    assert Free.now(1.0, cuda).budget == 900, "all but what belongs to others"


LARGE = Workload(prompt_tokens=600, max_tokens=1000, prompts_per_step=64, group_size=16)


def test_micro_batches_of_an_accelerator_are_as_large_as_memory_allows(footprint: Footprint) -> None:
    """On a CPU the same work has micro-batches of 1,200 tokens, whatever the memory."""
    device = replace(footprint, accelerator=True)
    assert choose_sizes(footprint, LARGE, 10**13).micro_batch_tokens == 1200
    assert choose_sizes(device, LARGE, 10**13).micro_batch_tokens == ACCELERATOR_TOKENS
    budget = forecast_memory(device, LARGE, 20_000, 1).training
    chosen = choose_sizes(device, LARGE, budget)
    assert chosen.micro_batch_tokens >= 20_000
    assert chosen.memory.training <= budget
    assert forecast_memory(device, LARGE, chosen.micro_batch_tokens + 1, 1).training > budget


def test_memory_of_an_accelerator_counted_by_hand(footprint: Footprint) -> None:
    """A tiny model, 1,000 bytes of other models: 2 layers, 48 tokens of 32 float32 numbers, all in one micro-batch."""
    device = replace(footprint, accelerator=True, gradients=10**9)
    work = Workload(prompt_tokens=5, max_tokens=4, prompts_per_step=1, group_size=2)
    memory = forecast_memory(device, work, 10**6, 1)
    kept = device.activations([(5, [3, 3])], recompute=False)
    logits = 3 * 8 * 48 * 4 + 48 * 32 * 4  # 8 targets; the gradient of the head's weight
    assert memory.activations == int(DEVICE_FRAGMENTS * kept)
    assert memory.backward == int(DEVICE_FRAGMENTS * (kept // 2))
    assert memory.logits == int(DEVICE_FRAGMENTS * logits)
    assert memory.gradients == int(DEVICE_FRAGMENTS * (10**9 - kept - logits))
    on_cpu = forecast_memory(replace(device, accelerator=False), work, 10**6, 1)
    assert on_cpu.backward == 0
    assert on_cpu.activations == int(FRAGMENTS * kept)
    by_modules = forecast_memory(replace(device, accelerator=False, fused=False), work, 10**6, 1)
    assert by_modules.activations == int(MODULE_FRAGMENTS * kept)
    assert memory.training - on_cpu.training > 0


def test_the_cache_of_an_accelerator_has_whole_pages(footprint: Footprint) -> None:
    """Pages of 256 tokens: 300 tokens take 512, and 5 take 5. A CPU's cache has exactly the tokens."""
    work = Workload(prompt_tokens=5, max_tokens=300, prompts_per_step=2, group_size=4)
    device = forecast_memory(replace(footprint, accelerator=True), work, 10**6, 8)
    assert device.cache == int(DEVICE_FRAGMENTS * footprint.cache_token * (8 * 512 + 2 * 5))
    on_cpu = forecast_memory(replace(footprint, accelerator=False), work, 10**6, 8)
    assert on_cpu.cache == footprint.cache_token * (8 * 300 + 2 * 5)


def test_a_lag_keeps_copies_of_the_weights_and_samples_while_it_trains(footprint: Footprint) -> None:
    """The native engine has a copy with prepared weights of its own; each further step of lag needs one more copy."""
    alone = forecast_memory(footprint, WORK, 500, 8)
    assert "versions" not in alone.as_dict()["training"]
    for lag in (1, 2, 3):
        ahead = forecast_memory(footprint, replace(WORK, lag=lag), 500, 8)
        copies = lag * footprint.reference + footprint.prepared
        assert ahead.parts("training")["versions"] == copies
        assert ahead.training == alone.training + alone.cache + alone.work + copies
        assert ahead.sampling == alone.sampling + copies
        elsewhere = forecast_memory(footprint, replace(WORK, lag=lag, samples_elsewhere=True), 500, 8)
        assert elsewhere.parts("training").get("versions", 0) == (lag - 1) * footprint.reference
        assert elsewhere.training == alone.training + (lag - 1) * footprint.reference


def test_a_rank_has_shards_and_the_leader_a_copy_to_sample_from(footprint: Footprint) -> None:
    whole = replace(footprint, weights=800, gradients=800, moments=1600, reference=400, prepared=100, gathered=200)
    work = replace(WORK, reference=True, shards=4)
    alone, rank = (forecast_memory(whole, replace(work, shards=shards), 500, 8) for shards in (0, 4))
    assert (rank.weights, rank.optimizer, rank.reference) == (200, 400, 100)
    assert (alone.gathered, rank.gathered) == (0, 200)
    assert rank.prepared == 0, "the fused decoder is not used"
    assert rank.versions == 400 + 100
    assert rank.gradients == int(FRAGMENTS * 200)
    assert (rank.cache, rank.work, rank.activations) == (alone.cache, alone.work, alone.activations)
    assert forecast_memory(whole, replace(work, engines=True), 500, 8).versions == 400, "engines sample elsewhere"
    assert forecast_memory(whole, replace(work, lag=2), 500, 8).versions == 2 * 400 + 100


def test_a_rank_gathers_two_layers_and_what_is_outside_of_layers() -> None:
    policy = make_policy(num_hidden_layers=4)
    layer = sum(weight.nbytes for weight in policy.layers[0].parameters())
    found = measure_footprint(policy, process=1000, progress=NullProgress())
    assert found.gathered == sum(weight.nbytes for weight in policy.model.parameters()) - 2 * layer


def test_a_model_that_is_too_large_for_one_process_is_trained_in_shards(footprint: Footprint) -> None:
    large = replace(footprint, weights=8 * 10**9, gradients=8 * 10**9, moments=16 * 10**9, reference=4 * 10**9)
    with pytest.raises(UsageError, match=r"training needs at least 32\.\d\d GB"):
        choose_sizes(large, WORK, 20 * 10**9)
    chosen = choose_sizes(large, replace(WORK, shards=4), 20 * 10**9)
    assert chosen.memory.peak < 12.5 * 10**9
    with pytest.raises(UsageError) as error:
        choose_sizes(large, replace(WORK, shards=4, reference=True), 15 * 10**9)
    assert "allows 15.00 GB, but rank 0 has the whole model, the reference and the copy" in str(error.value)
    assert 'takes 16.10 GB; raise it (a larger share, or e.g. "16.2 GB")' in str(error.value)


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_the_sizes_of_a_run_that_samples_ahead_fit_together(footprint: Footprint, share: float) -> None:
    """Neither sampling nor training takes all of the memory."""
    work = replace(ASKED, lag=2)
    least = forecast_memory(footprint, work, work.smallest, 1, True).peak
    most = forecast_memory(footprint, work, MAX_TOKENS, work.completions).peak
    budget = int(least + share * (most - least))
    chosen = choose_sizes(footprint, work, budget)
    assert chosen.memory.peak <= budget
    assert chosen.memory == forecast_memory(footprint, work, chosen.micro_batch_tokens, chosen.slots, chosen.recompute)
    assert chosen.slots >= 1
    assert chosen.micro_batch_tokens >= min(work.smallest, MAX_TOKENS)
