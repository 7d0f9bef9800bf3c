"""Results as lines for a person."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pyccl.bench import digest, kernels, outer
from pyccl.bench.all_reduce import Result
from pyccl.bench.churn import Arrivals, Losses, Quiet, Restarts
from pyccl.bench.encryption import Result as EncryptionResult
from pyccl.bench.epochs import Changes
from pyccl.bench.figures import MIB, Summary, ring_bytes
from pyccl.bench.machine import Machine
from pyccl.bench.memory import HOUR_S, Tracks
from pyccl.bench.nat import Cell, expected
from pyccl.bench.scale import Result as Scale
from pyccl.bench.topology import Result as TopologyResult
from pyccl.bench.wan import Result as WanResult
from pyccl.reference import QUANTIZE_BLOCK
from pyccl.units import show_rate, show_time


def heading(command: str, machine: Machine, versions: Mapping[str, str | None]) -> list[str]:
    """What every output begins with."""
    known = ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())
    return [f"command   {command}", f"machine   {machine}", f"versions  {known}", ""]


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equal length as aligned lines: the first column to the left, figures to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def seconds(value: float) -> str:
    """A time with a unit that fits it."""
    if value >= 1:
        return f"{value:.3f} s"
    return f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"


def _spread(summary: Summary) -> list[str]:
    return [seconds(summary.median), seconds(summary.min), seconds(summary.max)]


def all_reduce(result: Result) -> list[str]:
    plan = result.plan
    place = "in place" if plan.in_place else "into out"
    what = (
        f"all-reduce of {plan.size_bytes / MIB:g} MiB of {plan.dtype}, op {plan.op}, {place}, quantize "
        f"{plan.quantize or 'none'}, {plan.world} processes on loopback, connections {plan.connections}, "
        f"algorithm {result.algorithm}"
    )
    rows = [["", "median", "min", "max", "MiB sent/rank", "bus GB/s", "CPU s/GiB"]]
    rows += [
        [
            system.name,
            *_spread(system.seconds),
            f"{system.wire_tx_bytes / MIB:.2f}",
            f"{system.bus_gb_per_s:.3f}",
            f"{system.cpu_s_per_gib:.3f}",
        ]
        for system in result.systems
    ]
    lines = [
        what,
        f"{plan.iterations} iterations after {plan.warmup} to warm up; timed from first start to last return",
        "",
        *columns(rows),
        "",
        "bus: 2(N-1)/N x bytes / median; CPU: user and system time of all ranks for each GiB of one rank's tensor",
    ]
    return lines + _beside_gloo(result)


def nat_cell(cell: Cell) -> str:
    """A line, when it is known."""
    pair, paths = f"{cell.a} x {cell.b}", ", ".join(cell.paths)
    if not cell.is_as_expected:
        paths += f" (expected: {' or '.join(expected(cell.a, cell.b))})"
    firsts = dict.fromkeys(run.first for run in cell.runs if run.first != run.path)
    at_first = f", at first {', '.join(firsts)}" if firsts else ""
    wrong = sum(run.wrong for run in cell.runs)
    notes = [f"{wrong} values wrong"] if wrong else []
    notes += dict.fromkeys(run.error for run in cell.runs if run.error)
    time = "-" if cell.connect_s is None else seconds(cell.connect_s)
    return "; ".join([f"{pair:<34} {time:>10}  {paths}{at_first}", *notes])


def _beside_gloo(result: Result) -> list[str]:
    plan, lines = result.plan, []
    if result.ratio is not None:
        cpu = "-" if result.cpu_ratio is None else f"{result.cpu_ratio:.3f}"
        lines.append(f"pyccl / gloo: median {result.ratio:.3f}, CPU {cpu}; Gloo's bytes were counted on TCP sockets")
        if plan.quantize is not None:
            lines.append(f"Gloo has no codecs: it sends {plan.dtype} as it is, pyccl {plan.quantize} codes of it")
        if not plan.in_place:
            lines.append("Gloo always reduces in place, pyccl here into another array")
    return lines


def wan(result: WanResult) -> list[str]:
    """A row for each system."""
    plan, scenario = result.reduced.plan, result.scenario
    rows = [["", "median", "min", "max", "Mbit/s", "of the line", "MiB sent/rank", "CPU s/GiB"]]
    for system, rate in zip(result.reduced.systems, result.rates, strict=True):
        share = "-" if rate.line_share is None else f"{rate.line_share:.1%}"
        rows.append(
            [
                system.name, *_spread(system.seconds), f"{rate.mbit_s:.1f}", share,
                f"{system.wire_tx_bytes / MIB:.2f}", f"{system.cpu_s_per_gib:.3f}",
            ]
        )  # fmt: skip
    hosts = [f"{host.name} {show_rate(host.up.rate)} up, {show_rate(host.down.rate)} down" for host in scenario.hosts]
    what = (
        f"all-reduce of {plan.size_bytes / MIB:g} MiB of {plan.dtype}, op {plan.op}, quantize "
        f"{plan.quantize or 'none'}, {plan.world} peers, connections {plan.connections}, "
        f"algorithm {result.reduced.algorithm}"
    )
    lost, dropped = result.counts.lost, result.counts.dropped
    return [
        what,
        f"scenario {scenario.name}: {scenario.description}",
        f"hosts: {'; '.join(hosts)}; round trip {show_time(scenario.rtt_ns)}",
        f"{plan.iterations} iterations after {plan.warmup} to warm up; timed from first start to last return",
        "",
        *columns(rows),
        "",
        "Mbit/s: 2(N-1)/N x bytes of the tensor / median; of the line: what a peer sent of the slowest host's rate",
        *_beside_gloo(result.reduced),
        f"lines: {lost} packets lost, {dropped} dropped by queues; {result.counts.punctuality()}",
    ]


def encryption(result: EncryptionResult) -> list[str]:
    """A row for plain and for sealed connections."""
    plan = result.plan
    rows = [["", "median", "min", "max", "Mbit/s", "MiB sent/rank", "CPU s/GiB"]]
    for side in (result.plain, result.sealed):
        mbit_s = ring_bytes(plan.world, plan.size_bytes) * 8 / side.seconds.median / 1e6
        rows.append(
            [
                side.name, *_spread(side.seconds), f"{mbit_s:.1f}",
                f"{side.wire_tx_bytes / MIB:.2f}", f"{side.cpu_s_per_gib:.3f}",
            ]
        )  # fmt: skip
    return [
        f"all-reduce of {plan.size_bytes / MIB:g} MiB of {plan.dtype}, {plan.world} peers, {result.where}",
        f"{result.rounds} rounds of {plan.iterations} iterations after {plan.warmup} to warm up, plain and secure runs",
        "",
        *columns(rows),
        "",
        f"sealed / plain: median {result.ratio:.3f}",
        "Mbit/s: 2(N-1)/N x bytes of the tensor / median; CPU: of all ranks for each GiB of one rank's tensor",
    ]


def topology(result: TopologyResult) -> list[str]:
    """A row for each way to reduce, then the plan's prediction and the bound."""
    plan, scenario = result.plan, result.scenario
    rows = [["", "median", "min", "max", "algorithm"]]
    rows += [
        [name, *_spread(summary), result.algorithms[name]] for name, summary in result.seconds.items()
    ]  # fmt: skip
    predicted = "nothing" if result.predicted_s is None else seconds(result.predicted_s)
    coded = " as uint8" if plan.coded else ""
    bound = "-" if result.to_bound is None else f"{result.to_bound:.2f}"
    return [
        f"all-reduce of {plan.size_bytes / MIB:g} MiB of float32{coded}, {len(scenario.hosts)} peers",
        f"scenario {scenario.name}: {scenario.description}",
        f"{plan.iterations} iterations after {plan.warmup} to warm up; timed from first start to last return",
        "",
        *columns(rows),
        "",
        f"predicted for the plan: {predicted}; the lines allow {seconds(result.bound_s)}, without codes",
        f"planned: {bound} x the bound; the equal ring takes {result.ring_to_planned:.2f} x as long",
        f"optimize_topology took {seconds(result.measured_s)}",
    ]


def scale(result: Scale) -> list[str]:
    """A row for each size of group."""
    plan = result.plan
    rows = [[
        "members", "median", "min", "max", "CPU of all", "for each pair", "sent/member", "beside it", "to the master",
        "master's CPU", "memory/member", "before",
    ]]  # fmt: skip
    rows += [
        [
            f"{size.world}, {size.algorithm}", *_spread(size.seconds), seconds(size.cpu_s),
            seconds(size.cpu_s_per_pair), f"{size.payload_bytes:.0f} B", f"{size.data_bytes:.0f} B",
            f"{size.control_bytes:.1f} B", seconds(size.master_cpu_s), f"{size.memory_bytes.median / MIB:.1f} MiB",
            f"{size.start_bytes.median / MIB:.1f} MiB",
        ]
        for size in result.sizes
    ]  # fmt: skip
    return [
        f"{plan.operations} all-reduces of {plan.size_bytes} bytes one after the other, after {plan.warmup} to warm up",
        "",
        *columns(rows),
        "",
        "Times, CPU and bytes are those of an operation; sent: payload to other members, beside it: heads, completion,",
        "heartbeats. Memory: anonymous, after the operations and before the member connected.",
    ]


def kernel_rates(rates: Iterable[kernels.Rate]) -> list[str]:
    """A row for each (what, dtype, op) and place, a column for each instruction set."""
    rates = list(rates)
    names = list(dict.fromkeys(rate.kernel for rate in rates if rate.what != "memcpy"))
    table: dict[str, dict[str, str]] = {}
    for rate in rates:
        row = table.setdefault(" ".join(filter(None, (rate.what, rate.dtype, rate.op, rate.place))), {})
        spread = f"{rate.gib_per_s.median:.1f} ({rate.gib_per_s.min:.1f}..{rate.gib_per_s.max:.1f})"
        for name in names if rate.what == "memcpy" else [rate.kernel]:
            row[name] = spread
    rows = [["GiB/s of elements, median (min..max)", *names]]
    rows += [[what, *(cells.get(name, "-") for name in names)] for what, cells in table.items()]
    note = "One thread; counted: elements that a reduce (of two arrays) or an encoder reads, or that a decoder writes."
    return [*columns(rows), "", note]


def codec_errors(errors: Iterable[kernels.CodecError]) -> list[str]:
    rows = [["codec, error of float32", "bits", "data", "rms / rms", "worst / largest"]]
    rows += [[e.codec, f"{e.bits:.2f}", e.data, f"{e.rms:.2e}", f"{e.worst:.2e}"] for e in errors]
    return ["", *columns(rows), "", f"Blocks of {QUANTIZE_BLOCK}; bits: of an element on the wire, heads included."]


def digest_rates(rates: Iterable[digest.Rate]) -> list[str]:
    table: dict[str, dict[str, str]] = {}
    for rate in rates:
        spread = f"{rate.gib_per_s.median:.2f} ({rate.gib_per_s.min:.2f}..{rate.gib_per_s.max:.2f})"
        table.setdefault(f"{rate.what} {rate.kernel}".rstrip(), {})[rate.place] = spread
    rows = [["GiB/s hashed, median (min..max)", "cache", "memory"]]
    rows += [[what, cells["cache"], cells["memory"]] for what, cells in table.items()]
    return columns(rows)


def outer_rates(rates: Iterable[outer.Rate]) -> list[str]:
    rows = [["GiB/s read and written, median (min..max)", "", "of a copy"]]
    rows += [
        [
            rate.what,
            f"{rate.gib_per_s.median:.2f} ({rate.gib_per_s.min:.2f}..{rate.gib_per_s.max:.2f})",
            f"{rate.of_copy:.0%}",
        ]
        for rate in rates
    ]
    return columns(rows)


def _quiet(quiet: Quiet) -> str:
    return (
        f"before anybody came or went: {seconds(quiet.median_s)} between all-reduces (median), "
        f"{seconds(quiet.longest_s)} at most"
    )


def arrivals(result: Arrivals, with_rate: bool) -> list[str]:
    plan = result.plan
    rows = [["", "median", "min", "max"]]
    rows += [
        [label, *_spread(result.summary(name))]
        for label, name in (
            ("connect() to member", "connect_s"),
            ("state synchronised", "sync_s"),
            ("both", "total_s"),
            ("longest stall of a member", "stall_s"),
            ("CPU time of the sync, all processes", "cpu_s"),
        )
    ]
    what = (
        f"{plan.iterations} newcomers, one at a time, to {plan.world - 1} members that all-reduce "
        f"{plan.vector_bytes} bytes in a loop; state of {plan.state_bytes / MIB:g} MiB"
    )
    lines = [what, "", *columns(rows)]
    if with_rate:
        rate, cpu = result.summary("mb_per_s"), result.summary("cpu_s_per_gib")
        lines.append(
            f"rate of the sync, digests included: {rate.median:.0f} MB/s ({rate.min:.0f}..{rate.max:.0f}), "
            f"{rate.median * 8:.0f} Mbit/s"
        )
        lines.append(f"CPU time for each GiB that came: {cpu.median:.2f} s/GiB ({cpu.min:.2f}..{cpu.max:.2f})")
        extra = result.summary("extra_bytes")
        lines.append(
            f"most memory beyond the state itself: newcomer {extra.median / MIB:.1f} MiB "
            f"({extra.min / MIB:.1f}..{extra.max / MIB:.1f}), holder {result.holder_extra_bytes / MIB:.1f} MiB"
        )
    for number, arrival in enumerate(result.arrivals):
        shares = " + ".join(f"{sent / MIB:.2f}" for sent in arrival.source_bytes)
        lines.append(
            f"newcomer {number + 1} received {arrival.rx_bytes / MIB:.2f} MiB = {shares} from its sources,"
            f" {arrival.wire_rx_bytes / MIB:.2f} MiB on its sockets since connect()"
        )
        if with_rate:
            lines.append(f"  zstd: {arrival.packing}")
    return [*lines, _quiet(result.quiet)]


def losses(result: Losses) -> list[str]:
    plan = result.plan
    rows = [["", "median", "min", "max"]]
    for cause in plan.causes:
        rows.append([f"{cause}: longest gap of a survivor", *_spread(result.summary(cause, "gap_s"))])
        rows.append([f"{cause}: signal to all going on", *_spread(result.summary(cause, "recovered_s"))])
    what = (
        f"one of {plan.world} members lost, {plan.iterations} times each way, in a loop of all-reduces of "
        f"{plan.vector_bytes} bytes; killed: SIGKILL; silent: SIGSTOP with --peer-timeout {plan.peer_timeout_s:g}"
    )
    return [what, "", *columns(rows), _quiet(result.quiet)]


def restarts(result: Restarts) -> list[str]:
    plan = result.plan
    rows = [
        ["", "median", "min", "max"],
        ["longest gap of a member without a master", *_spread(result.summary("gap_s"))],
        ["master back to newcomer member", *_spread(result.summary("join_s"))],
    ]
    done = sum(restart.operations for restart in result.restarts)
    what = (
        f"{plan.iterations} times the master of {plan.world - 1} members that all-reduce {plan.vector_bytes} bytes in "
        f"a loop is killed and started again {plan.down_s:g} s later; then a newcomer comes"
    )
    return [what, "", *columns(rows), f"{done} all-reduces meanwhile, 0 failed", _quiet(result.quiet)]


def epoch_changes(result: Changes) -> list[str]:
    rows = [["", "master's CPU, median", "min", "max", "wall, median", "min", "max"]]
    for change, what in (
        ("loss", "one member of each group leaves"),
        ("join", "a newcomer comes to each group"),
        ("loss_alone", "one member of one group leaves"),
        ("join_alone", "a newcomer comes to one group"),
    ):
        rows.append([what, *(cell for name in ("cpu_s", "wall_s") for cell in _spread(result.summary(change, name)))])
    sizes = " + ".join(map(str, result.groups))
    what = (
        f"a master and {result.plan.peers} simulated peers in groups of {sizes}, which change their epoch, all at the "
        f"same moment or one alone, {result.plan.iterations} times each way"
    )
    return [what, "", *columns(rows), "", "wall: until the last peer has entered; the peers share one process"]


def memory(result: Tracks) -> list[str]:
    plan = result.plan
    rows = [
        ["", "anonymous, first", "last", "KiB/hour", "+-", "2nd half", "+-", "RSS, last", "KiB/hour", "descriptors"],
    ]
    for track in result.tracks:
        first, last = track.samples[0], track.samples[-1]
        growth, late, resident = track.slope(), track.late_slope(), track.slope("rss_bytes")
        rows.append([
            track.name, f"{first.anonymous_bytes / MIB:.2f} MiB", f"{last.anonymous_bytes / MIB:.2f} MiB",
            f"{growth.bytes_per_hour / 1024:.1f}", f"{growth.plus_minus / 1024:.1f}",
            f"{late.bytes_per_hour / 1024:.1f}", f"{late.plus_minus / 1024:.1f}", f"{last.rss_bytes / MIB:.2f} MiB",
            f"{resident.bytes_per_hour / 1024:.1f}", f"{first.descriptors} -> {last.descriptors}",
        ])  # fmt: skip
    what = (
        f"{plan.peers} members that stay and one that comes and goes ({result.visits} times), {result.rounds} rounds "
        f"in {plan.minutes:g} minutes, of which {plan.warm_up_minutes:g} to warm up; {result.cpu_share:.0%} of a core. "
        f"Before, {plan.passers} others had come and left"
    )
    hours = (plan.minutes - plan.warm_up_minutes) * 60 / HOUR_S
    return [what, "", *columns(rows), "", f"line over {hours:.2f} h; +-: half of the 95 % interval"]
