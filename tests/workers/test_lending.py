"""Layers that lend their memory: not a bit of any logit changes, the arena keeps its books, requests stay where they
were, and nothing is lost where a copy fails."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import settings, strategies
from hypothesis.stateful import initialize, invariant, rule, run_state_machine_as_test

from kernels.layout import UNIT_BYTES, CacheShape, Format, Tier
from kvpilot.v1 import generation_pb2
from tests.tiny import Drive, prompt, reference, run, tiny_engine, tiny_loaded, tiny_model, tiny_profile
from tests.workers.test_arena import SHAPES, ArenaMachine
from tests.workers.test_switch import check_tables, logits_now
from workers.cache.arena import Arena, Lot, Region, TierFullError, page_blocks
from workers.engine.attention import cache_shape
from workers.engine.engine import Engine
from workers.engine.lending import spread, weights_to_lend
from workers.errors import INVALID_ARGUMENT, ProblemError

LAYERS = 7
LENDABLE = 4
IDS = prompt(301, 3)


def loaded(**changes: object):
    found = tiny_loaded(num_hidden_layers=LAYERS, **changes)
    shape = cache_shape(found.model.config, next(found.model.parameters()).dtype)
    return replace(found, profile=tiny_profile(shape))


def engine(lendable: int = LENDABLE, **more: object) -> Engine:
    changes = more.pop("changes", {})
    return tiny_engine(loaded(**changes), lendable_layers=lendable, **more)


def decoding(engine: Engine, pipeline: str = "full", tokens: int = 10, most: int = 48) -> Drive:
    drive = Drive(engine)
    drive.submit("job", IDS, most, pipeline=pipeline, top_logprobs=3)
    drive.until(lambda: drive.generated("job") >= tokens)
    return drive


def keep_lent(engine: Engine) -> None:
    """Layers stay as tests put them."""
    engine._memory.balance = lambda waiting: None  # type: ignore[method-assign]


def lend(engine: Engine) -> None:
    """Has a layer lend its memory, and spoils what it leaves there."""
    assert engine._lending.lend()
    arena = engine.cache.device
    arena.memory(arena.regions[engine._lending.lent - 1]).fill_(0xFF)


@dataclass
class Breaks:
    """Attention that fails in a layer, so that a pass does not reach its end."""

    at: int

    def attend(self, layer: int, *_: object) -> torch.Tensor:
        if layer == self.at:
            raise ArithmeticError
        return torch.zeros(1, 1, 4, 16)


def break_a_pass(engine: Engine, at: int) -> None:
    with pytest.raises(ArithmeticError):
        engine._runner.attend(Breaks(at), 0, [1])


@pytest.fixture(scope="module")
def expected() -> list[generation_pb2.Token]:
    """What a worker says whose layers lend nothing."""
    return decoding(engine(0)).finish()["job"].tokens


# -- the same output -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_bit_of_the_logits_is_that_of_weights_at_home(tied: bool, dtype: torch.dtype) -> None:
    changes = {"tie_word_embeddings": tied, "dtype": dtype}
    plain, worker = decoding(engine(0, changes=changes)), decoding(engine(changes=changes))
    keep_lent(worker.engine)
    lending, want = worker.engine._lending, logits_now(plain, "job")
    for lent in [1, 2, 3, 4, 3, 2, 1, 0, 1, 2]:
        while lending.lent < lent:
            lend(worker.engine)
        while lending.lent > lent:
            assert lending.take_back()
        for _ in range(2):  # each pass begins with what the one before has left
            assert torch.equal(logits_now(worker, "job"), want)
        plain.engine.step()
        worker.engine.step()
        want = logits_now(plain, "job")
        assert torch.equal(logits_now(worker, "job"), want)
        if lent:  # there and back with no pass between
            assert lending.take_back()
            lend(worker.engine)
            assert torch.equal(logits_now(worker, "job"), want)
    assert plain.finish()["job"].tokens == worker.finish()["job"].tokens


@pytest.mark.parametrize("model_type", ["qwen2", "phi3", "gpt_neox", "gemma"])
def test_other_architectures_lend_too(model_type: str) -> None:
    changes = {"gpt_neox": {"num_key_value_heads": 4}, "gemma": {"head_dim": 16}}.get(model_type, {})
    want = reference(tiny_model(model_type, attention="sdpa", num_hidden_layers=LAYERS, **changes), IDS, 12)
    model = tiny_loaded(model_type, num_hidden_layers=LAYERS, **changes)
    drive = decoding(tiny_engine(model, lendable_layers=3), "oneiros(layers=3)", most=12)
    assert drive.engine._lending.lent == 3
    assert drive.finish()["job"].token_ids == want


def test_the_weights_in_the_arena_are_the_model_s_and_close_gives_them_back() -> None:
    model, plain = loaded(), tiny_model(num_hidden_layers=LAYERS).state_dict()
    worker = tiny_engine(model, lendable_layers=LENDABLE)
    memory = worker.cache.device.data.untyped_storage().data_ptr()
    inside = {
        index
        for index, layer in enumerate(model.model.model.layers)
        if {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()} == {memory}
    }
    assert inside == set(spread(LAYERS, LENDABLE + 2)[2:])
    assert all(torch.equal(value, plain[name]) for name, value in model.model.state_dict().items())
    drive = decoding(worker, "oneiros(layers=4)")
    worker.stop(1.0)
    assert drive.engine._lending.lent
    assert all(torch.equal(value, plain[name]) for name, value in model.model.state_dict().items())
    again = decoding(tiny_engine(model, lendable_layers=2), "oneiros(layers=2)", most=12)
    assert again.finish()["job"].token_ids == decoding(engine(0), most=12).finish()["job"].token_ids


@pytest.mark.parametrize("lent", [1, LENDABLE])
@pytest.mark.parametrize("pipeline", ["infinigen(share=0.5, recent=64)", "snapkv(keep=0.5) | kivi(bits=4)"])
def test_stages_that_look_a_layer_ahead_see_its_weights(pipeline: str, lent: int) -> None:
    """A guess calls the next layer's attention while a layer computes, also behind a pass that did not end."""
    outcomes = []
    for lendable in (0, lent):
        drive = decoding(engine(lendable), pipeline)
        keep_lent(drive.engine)
        for _ in range(lendable):
            lend(drive.engine)
        for at in range(LAYERS):
            break_a_pass(drive.engine, at)
            drive.engine.step()
        outcomes.append(drive.finish()["job"].tokens)
    assert outcomes[0] == outcomes[1]


def test_a_pass_that_ends_in_the_middle_leaves_no_layer_with_another_s_weights(expected) -> None:
    drive = decoding(engine(), "oneiros(layers=4)")
    for at in [*range(LAYERS), 3, 3]:
        break_a_pass(drive.engine, at)
        drive.engine.step()
    assert drive.finish()["job"].tokens == expected


# -- the stage -------------------------------------------------------------------------------------------------------


def test_layers_lend_for_as_long_as_a_request_asks_for_it() -> None:
    worker, plain = engine(), Drive(engine(0))
    budget = worker.cache.device.budget_bytes
    drive = Drive(worker)
    drive.submit("two", IDS, 48, pipeline="oneiros(layers=2)", top_logprobs=3)
    drive.submit("three", prompt(64, 5), 12, pipeline="snapkv(keep=0.5) | oneiros(layers=3)", top_logprobs=3)
    plain.submit("two", IDS, 48, pipeline="full", top_logprobs=3)
    plain.submit("three", prompt(64, 5), 12, pipeline="snapkv(keep=0.5)", top_logprobs=3)
    drive.until(lambda: drive.generated("three") >= 5)
    assert worker._lending.lent == 3
    drive.until(lambda: "three" in drive.outcomes and drive.outcomes["three"].events[-1].HasField("finished"))
    drive.until(lambda: worker._lending.lent == 2)
    region = worker.cache.device.region_bytes(worker.cache.device.regions[0])
    assert worker.cache.device.budget_bytes == budget + 2 * region
    state = drive.reports[-1].worker.tiers[0]
    assert (state.name, state.budget_bytes) == ("device", budget + 3 * region)  # as it was when "three" ended
    outcomes = drive.finish()
    worker.step()
    worker.step()
    assert worker._lending.lent == 0
    assert worker.cache.device.budget_bytes == budget
    for name, outcome in plain.finish().items():
        assert outcomes[name].tokens == outcome.tokens
    assert outcomes["two"].finished.cache.device_bytes == outcomes["two"].finished.cache.full_cache_bytes


def test_a_switch_has_layers_lend_and_one_back_gives_them_their_memory(expected) -> None:
    worker = engine()
    drive = Drive(worker)
    drive.submit("job", IDS, 48, top_logprobs=3)
    drive.until(lambda: drive.generated("job") >= 5)
    assert drive.direct("job", "oneiros(layers=4)", 1).applied.to_pipeline == "oneiros(layers=4)"
    worker.step()
    assert worker._lending.lent == 4
    drive.direct("job", "full", 2)
    for lent in (3, 2, 1, 0):
        worker.step()
        assert worker._lending.lent == lent
    assert drive.finish()["job"].tokens == expected


def test_a_worker_with_fewer_layers_to_lend_refuses_and_says_so() -> None:
    worker = engine(2)
    with pytest.raises(ProblemError) as refused:
        Drive(worker).submit("job", IDS, pipeline="oneiros(layers=3)")
    assert refused.value.problem.code == INVALID_ARGUMENT
    [violation] = refused.value.problem.violations
    assert violation.field == "pipeline"
    assert "'oneiros' has 3 layers lend their memory" in violation.description
    assert "at most 2 can (its lendable_layers)" in violation.description
    drive = decoding(worker)
    worker._live["job"].pinned = None
    with pytest.raises(ProblemError, match="at most 2 can"):
        drive.direct("job", "oneiros(layers=4)")
    unfit = {info.name: info.unfit for info in worker.hello().model.stages}
    assert unfit["oneiros"] == ""
    assert "lendable_layers" in {info.name: info.unfit for info in engine(0).hello().model.stages}["oneiros"]
    with pytest.raises(ValueError, match=r"default_pipeline 'oneiros.*lendable_layers"):
        engine(0, default_pipeline="oneiros(layers=1)")


def test_models_that_cannot_lend_so_many_are_refused() -> None:
    with pytest.raises(ValueError, match="lendable_layers 6: this model has 7 layers, of which 5 can lend"):
        engine(6)
    model = loaded()
    layers = model.model.model.layers
    layers[0].mlp.up_proj.weight = layers[3].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"shares mlp\.up_proj\.weight"):
        weights_to_lend(model.model, 5)


def test_layers_that_lend_are_spread_over_the_model() -> None:
    assert spread(30, 2) == [29, 14]
    for layers in (3, 7, 12, 30, 32):
        for count in range(2, layers + 1):
            chosen = sorted(spread(layers, count))
            assert len(set(chosen)) == count
            assert chosen[-1] == layers - 1
            gaps = [b - a for a, b in pairwise([*chosen, chosen[0] + layers])]
            assert max(gaps) <= max(2, 2 * layers // count + 1)
            assert spread(layers, count)[: count - 1] == spread(layers, count - 1)


# -- pressure --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crowd() -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Four jobs whose caches, 616 KiB each, do not fit 2,400 KiB together; and what they get where they do."""
    jobs = {f"job{n}": prompt(301, 10 + n) for n in range(4)}
    return jobs, {name: outcome.token_ids for name, outcome in run(engine(0), jobs, 40).items()}


@pytest.mark.parametrize("host_bytes", [0, 16 << 20])
def test_pressure_has_layers_lend_before_it_touches_a_request(crowd, host_bytes: int) -> None:
    jobs, expected = crowd

    def served(lendable: int) -> tuple[Engine, int]:
        worker = engine(lendable, device_budget_bytes=2400 << 10, host_budget_bytes=host_bytes, step_tokens=1400)
        outcomes = run(worker, jobs, 40, pipeline="full")
        assert {name: outcome.token_ids for name, outcome in outcomes.items()} == expected
        harmed = [len(outcome.switches) + outcome.finished.usage.preemptions for outcome in outcomes.values()]
        return worker, sum(harmed)

    assert served(0)[1] > 0
    worker, harmed = served(5)
    assert harmed == 0
    for _ in range(5):
        worker.step()
    assert worker._lending.lent == 0


def test_what_is_waiting_is_admitted_to_memory_that_layers_can_lend(crowd) -> None:
    jobs, expected = crowd
    drive = Drive(engine(5, device_budget_bytes=1960 << 10, host_budget_bytes=0, step_tokens=64))
    for name, ids in jobs.items():
        drive.submit(name, ids, 40, pipeline="full")
    most, lent = 0, []
    while drive.engine.step():
        most, lent = max(most, len(drive.engine._scheduler.running)), [*lent, drive.engine._lending.lent]
    assert most == len(jobs)
    assert max(lent) > 0
    assert {name: outcome.token_ids for name, outcome in drive.outcomes.items()} == expected
    assert sum(a != b for a, b in pairwise(lent)) <= 2 * 5  # up once, and down once: nothing goes to and fro


def test_one_request_can_have_all_that_layers_lend() -> None:
    worker = engine(5, device_budget_bytes=600 << 10, host_budget_bytes=0)
    plain = engine(0, device_budget_bytes=600 << 10, host_budget_bytes=0).hello().model
    model = worker.hello().model
    most = model.capacity_bytes // model.raw_bytes_per_token
    assert most > 1.5 * plain.capacity_bytes // plain.raw_bytes_per_token
    ids = prompt(most - 100, 22)
    outcome = run(worker, {"job": ids}, 100, pipeline="full")["job"]
    assert len(outcome.token_ids) == 100
    assert not outcome.switches
    assert outcome.token_ids == run(engine(0), {"job": ids}, 100)["job"].token_ids


# -- taking back -----------------------------------------------------------------------------------------------------


def test_published_rows_move_out_of_the_way() -> None:
    worker = engine(5, device_budget_bytes=600 << 10)
    keep_lent(worker)
    arena = worker.cache.device
    lot, own = arena.open_lot(Format.RAW), arena.free_bytes // arena.page_bytes
    arena.allocate(lot, own * page_blocks(worker.shape))
    for _ in range(5):
        lend(worker)
    first = run(worker, {"first": IDS}, 20, top_logprobs=3)["first"]
    rows = list(worker.cache.prefixes._rows.values())
    assert len(rows) == 10
    assert all(row.address.min() >= own * arena.page_units for row in rows)
    arena.close_lot(lot)
    for _ in range(5):
        assert worker._lending.take_back()
    again = run(worker, {"again": IDS}, 20, top_logprobs=3)["again"]
    assert again.finished.usage.reused_prompt_tokens == 288
    assert again.tokens == first.tokens


@pytest.mark.parametrize("recalls", ["arkvale(share=0.5, recent=64)", "shadowkv(share=0.5, recent=64)"])
def test_blocks_move_out_of_the_way_and_so_do_pools(recalls: str) -> None:
    """A request, and one that reads few of its blocks through a pool, or by what it keeps of them, on pages that go
    back."""
    outcomes, moved = [], []
    for lendable in (0, 5):
        worker = engine(lendable, device_budget_bytes=2800 << 10)
        keep_lent(worker)
        drive, arena = Drive(worker), worker.cache.device
        while lendable and worker._lending.lend():
            pass
        drive.submit("filler", prompt(1100, 1), 4, pipeline="full")
        drive.until(lambda drive=drive: drive.generated("filler") >= 1)
        drive.submit("first", IDS, 2, pipeline="full")
        drive.submit("recalls", prompt(600, 8), 60, pipeline=recalls)
        drive.submit("stays", prompt(200, 9), 60, pipeline="full")
        drive.until(lambda drive=drive: drive.generated("stays") >= 20)
        worker.cache.prefixes.drop(1500 << 10)  # some of the filler's
        for lent in range(lendable - 1, -1, -1):
            region = arena.regions[lent]
            pages = np.arange(region.first, region.end)
            held = int((arena._page_lot[pages] != 0).sum())
            assert worker._lending.take_back()
            assert not arena._page_lot[pages].any()
            moved.append(held)
            drive.engine.step()
            check_tables(drive)
        drive.submit("again", IDS, 20, pipeline="full", top_logprobs=3)
        found = drive.finish()
        again = found.pop("again") if "shadowkv" in recalls else found["again"]
        # what shadowkv keeps leaves little room for published rows, and without them numbers are rounded otherwise
        assert again.finished.usage.reused_prompt_tokens > 0 or "shadowkv" in recalls
        outcomes.append({name: outcome.tokens for name, outcome in found.items()})
    assert sum(moved) > 10
    assert outcomes[0] == outcomes[1]


def test_a_request_is_not_moved_while_its_switch_is_prepared(expected) -> None:
    worker = engine(switch_step_share=0.0, switch_least_blocks=20)
    drive = decoding(worker, "oneiros(layers=1)")
    keep_lent(worker)
    drive.engine._live["job"].pinned = None
    drive.order("job", "host(recent=64)")
    worker.step()
    assert worker._live["job"].cache.preparation is not None
    assert not worker._lending.take_back()
    assert worker._lending.lent == 1
    drive.until(lambda: worker._live["job"].cache.preparation is None)
    assert worker._lending.take_back()
    assert drive.finish()["job"].tokens == expected


def test_a_layer_whose_blocks_have_nowhere_to_go_goes_on_lending(expected) -> None:
    worker = engine(1, device_budget_bytes=8 << 20)
    drive = decoding(worker, "oneiros(layers=1)")
    keep_lent(worker)
    arena = worker.cache.device
    lot = arena.open_lot(Format.RAW)
    per_page = page_blocks(worker.shape)
    arena.allocate(lot, arena.free_bytes // arena.page_bytes * per_page)
    assert arena.free_bytes == 0
    assert not worker._lending.take_back()
    assert worker._lending.lent == 1
    arena.close_lot(lot)
    assert worker._lending.take_back()
    assert drive.finish()["job"].tokens == expected


@pytest.mark.parametrize("lent", [1, 3])
@pytest.mark.parametrize("which", ["its own", "a slot's"])
def test_a_copy_that_fails_leaves_everything_as_it_was(expected, lent: int, which: str) -> None:
    """A tensor without data cannot be copied from."""
    worker = engine()
    drive = decoding(worker, f"oneiros(layers={lent})")
    keep_lent(worker)
    lending, budget, failed = worker._lending, worker.cache.device.budget_bytes, 0
    for _ in range(4):  # whatever the slots hold
        broken = lending._layers[1 + lent] if which == "its own" else lending._layers[1]
        fails = which == "its own" or (lent == 1 and lending._slots[1].holds is not broken)
        copy, broken.copy = broken.copy, broken.copy.to("meta")
        if fails:
            with pytest.raises(RuntimeError):
                lending.take_back()
            assert lending.lent == lent
            assert worker.cache.device.budget_bytes == budget
            failed += 1
        broken.copy = copy
        worker.step()
    assert failed or lent > 1
    for back in range(lent - 1, -1, -1):
        assert lending.take_back()
        assert lending.lent == back
    assert drive.finish()["job"].tokens == expected


def test_a_worker_that_cannot_copy_weights_back_serves_on(expected) -> None:
    worker = engine()
    drive = decoding(worker, "oneiros(layers=2)")
    layer = worker._lending._layers[3]
    copy, layer.copy = layer.copy, layer.copy.to("meta")
    drive.engine._live["job"].pinned = None
    drive.direct("job", "full")
    worker._memory.balance(0)
    layer.copy = copy
    for _ in range(5):
        worker.step()
    assert worker._lending.lent == 2
    assert drive.finish()["job"].tokens == expected


# -- the arena -------------------------------------------------------------------------------------------------------


class LendingMachine(ArenaMachine):
    """The same random requests while regions are lent and taken back."""

    @initialize(
        target=ArenaMachine.lots,
        shape=strategies.sampled_from(SHAPES),
        pages=strategies.integers(2, 5),
        regions=strategies.lists(strategies.integers(1, 3), min_size=1, max_size=3),
    )
    def start(self, shape: CacheShape, pages: int, regions: list[int]) -> Lot:
        page_bytes = page_blocks(shape) * shape.block_bytes(Format.RAW)
        self.shape, self.pages, self.own = shape, pages, pages
        beyond = [count * page_bytes - UNIT_BYTES // 2 for count in regions]
        self.arena = Arena(Tier.DEVICE, pages * page_bytes, shape, torch.device("cpu"), beyond)
        assert [region.pages for region in self.arena.regions] == regions
        assert self.arena.most_bytes == (pages + sum(regions)) * page_bytes
        self.live: dict[Lot, set[int]] = {}
        self.lent: list[Region] = []
        return self.open(Format.RAW)

    @rule(data=strategies.data())
    def lend_a_region(self, data: strategies.DataObject) -> None:
        home = [region for region in self.arena.regions if region not in self.lent]
        if home:
            region = data.draw(strategies.sampled_from(home))
            self.arena.memory(region).fill_(0)  # nobody else's
            self.arena.lend(region)
            self.lent.append(region)
            self.pages += region.pages

    @rule(data=strategies.data())
    def take_a_region_back(self, data: strategies.DataObject) -> None:
        if not self.lent:
            return
        region = data.draw(strategies.sampled_from(self.lent))
        addresses = np.array(sorted(address for lot in self.live.values() for address in lot), np.int32)
        units = self.arena.data.view(-1, UNIT_BYTES)
        units[addresses] = torch.randint(0, 256, (len(addresses), UNIT_BYTES), dtype=torch.uint8)
        contents, used, free = units[addresses].clone(), self.arena.used_bytes, self.arena.free_bytes
        if free < self.arena.region_bytes(region):
            with pytest.raises(TierFullError):
                self.arena.take_back(region)
            assert torch.equal(units[addresses], contents)
            assert (self.arena.used_bytes, self.arena.free_bytes) == (used, free)
            return
        now = self.arena.take_back(region)
        moved = now(addresses)
        assert torch.equal(units[moved], contents)
        outside = (addresses < region.first * self.arena.page_units) | (addresses >= region.end * self.arena.page_units)
        assert (moved[outside] == addresses[outside]).all()  # nothing moves that need not
        to = dict(zip(addresses.tolist(), moved.tolist(), strict=True))
        self.live = {lot: {to[address] for address in mine} for lot, mine in self.live.items()}
        assert self.arena.used_bytes == used
        self.lent.remove(region)
        self.pages -= region.pages

    @invariant()
    def what_is_not_lent_is_let_alone(self) -> None:
        if not hasattr(self, "arena"):
            return
        for region in self.arena.regions:
            if region not in self.lent:
                pages = range(region.first, region.end)
                assert not set(pages) & {a // self.arena.page_units for lot in self.live.values() for a in lot}
                assert not set(pages) & set(self.arena._free_pages.tolist())

    def teardown(self) -> None:
        """Everything released, all regions can be taken back."""
        if hasattr(self, "arena"):
            for lot, addresses in self.live.items():
                lot.borrowed = False
                self.arena.release(np.array(sorted(addresses), np.int32))
            self.live = {}
            for region in self.lent:
                self.arena.take_back(region)
            self.pages = self.own
        super().teardown()


def test_the_arena_keeps_its_books_while_regions_come_and_go() -> None:
    run_state_machine_as_test(
        LendingMachine,
        settings=settings(derandomize=True, max_examples=60, stateful_step_count=40, deadline=None, database=None),
    )


def test_pages_that_are_lent_are_used_last() -> None:
    shape = SHAPES[0]
    page_bytes = page_blocks(shape) * shape.block_bytes(Format.RAW)
    arena = Arena(Tier.DEVICE, 3 * page_bytes, shape, torch.device("cpu"), [2 * page_bytes])
    arena.lend(arena.regions[0])
    lot = arena.open_lot(Format.RAW)
    blocks = arena.allocate(lot, 5 * page_blocks(shape))
    assert sorted(set((blocks // arena.page_units)[-2 * page_blocks(shape) :].tolist())) == [3, 4]
    arena.release(blocks)
    again = arena.allocate(lot, 3 * page_blocks(shape))
    assert set((again // arena.page_units).tolist()) == {0, 1, 2}
