"""`icsearch plan` as a function: from a request to a plan. No torch."""

from __future__ import annotations

from icsearch.commands.requests import AUTO, DEFAULT_NUM_SEQUENCES, PlanRequest
from icsearch.core.errors import IcsearchError
from icsearch.model.shape import default_batch_size
from icsearch.planning.devices import Devices, parse_devices
from icsearch.planning.forecast import Case, Plan, make_plan
from icsearch.planning.modelfile import open_model_file
from icsearch.planning.rehearsal import Workload
from icsearch.planning.serving import Serving, plan_serving


def plan(request: PlanRequest) -> Plan:
    """The plan of a search; raises IcsearchError for bad input, and where nothing fits."""
    return make_plan(make_case(request))


def serving(request: PlanRequest) -> Serving:
    """What sharing buys where the model is served; raises IcsearchError for bad input."""
    return plan_serving(open_model_file(request.model), devices_of(request))


def devices_of(request: PlanRequest) -> Devices:
    """As typed; raises IcsearchError."""
    return parse_devices(
        request.devices,
        memory=request.device_memory,
        flops=request.device_flops,
        bandwidth=request.bandwidth,
        read_rate=request.read_rate,
    )


def make_case(request: PlanRequest) -> Case:
    """What a request asks, checked, in numbers; raises IcsearchError."""
    devices, model = devices_of(request), open_model_file(request.model)
    sequences = request.num_sequences or DEFAULT_NUM_SEQUENCES
    seq_len = request.seq_len or max(256, 4 * model.shape.index_topk)
    if seq_len <= model.shape.index_topk:
        raise IcsearchError(
            f"--seq-len {seq_len} is not longer than index_topk {model.shape.index_topk}: every selection would be all "
            f"tokens, and every flip free; give more than {model.shape.index_topk}"
        )
    if model.max_positions and seq_len > model.max_positions:
        raise IcsearchError(f"--seq-len {seq_len} is more than the model's {model.max_positions} positions: give less")
    flips = request.resolve_num_shared(model.start)
    workload = Workload(
        start=model.start,
        flippable=frozenset(request.flippable(model.start)),
        num_shared=flips,
        stages=request.num_stages,
        sequences=sequences,
        keep_full=tuple(sorted(request.keep_full)),
    )
    dtype = model.dtype if request.dtype == AUTO else request.dtype
    batch_size = min(request.batch_size or default_batch_size(seq_len, sequences), sequences)
    return Case(model, workload, seq_len, batch_size, dtype, devices)
