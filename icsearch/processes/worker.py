"""What every process but rank 0 does: take orders and do its part, until the run ends."""

from __future__ import annotations

from icsearch.processes.member import Member, losses_message
from icsearch.processes.muster import follow_in
from icsearch.processes.world import World


def serve(world: World) -> None:
    """Do what rank 0 orders. Never returns: whatever ends the run is raised here."""
    member: Member | None = None
    while True:
        order = world.order()
        if order["do"] == "load":
            member = follow_in(world, order)
        elif member is None:
            raise RuntimeError(f"rank 0 orders to {order['do']} before it has ordered to load")
        elif order["do"] == "set up":
            member.set_up(order)
        elif order["do"] == "retain":
            member.retain(order)
        elif order["do"] == "trace":
            if (where := member.trace(order)) is not None:
                world.post(f"traced/{order['item']}", where)
        elif order["do"] == "job":
            if (events := member.do_job(order)) is not None:
                world.post(f"events/{order['item']}/{member.data_rank}", events)
        elif (done := member.sweep(order)) is not None:
            world.post(f"losses/{order['item']}/{member.data_rank}", losses_message(done))
