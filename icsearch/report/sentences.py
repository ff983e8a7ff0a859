"""What the terminal, the page and the card say in words, each thing said in one place. Every number has its error.

A run is in-sample: its losses are measured on the batches that the search chose by. So is a pattern of an evaluation
that was searched on some of the sequences it is evaluated on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from icsearch.core.statistics import Difference
from icsearch.core.text import format_bytes
from icsearch.engines.native import LOAD_WITHOUT_INDEXERS
from icsearch.report import numbers
from icsearch.report.eval_view import EvalRow, EvalView, Gap
from icsearch.report.fisher_view import FLIP, FisherView, Ranked
from icsearch.report.view import Reference, Refined, RunView, predictions
from icsearch.runs import results
from icsearch.runs.evaluation import CLEAR_LOSS, excludes_clear_loss
from icsearch.runs.record import RunRecord
from icsearch.runs.results import weights_read

IN_SAMPLE, FOREIGN = "in-sample", "other model"
SEARCHED_HERE = "searched on these very batches"
FOUND_ELSEWHERE = "found on another model, or on other weights of this one"
NOT_KNOWN = f"not known: too few tokens to exclude a loss of {CLEAR_LOSS:g} or more"
ENGINES_SHOWN = 2  # engines whose settings are written out; of the others a card has the names, a page what is folded
UNIFORM = "The uniform pattern with as many F layers"
EXACT = "Exact: these are the choices of Algorithm 1 on these sequences; of equal ones, the smaller layer."
BLOCKWISE_KERNELS = (
    "Block-wise kernels: of equal index scores the earliest token is chosen. The top-k of transformers chooses "
    "among them by shape, so losses by --kernels reference differ a little (on the demo checkpoint at 2048 tokens, "
    "0.24% of the queries have such a tie; it moved the loss by 0.002; benchmarks/kernels.py)."
)
TABLE_COUNT = (
    "In the table’s count the way forth, the recomputation and each backward pass (one for each draw, one for the "
    "text’s own labels) are a run of the layer, and a core attention under another layer’s selection is its part by "
    "FLOPs. Exact greedy is counted as this program would run it: a sweep for all flips of a step."
)
KINK_METHOD = (
    "How the kink is found: two straight lines that meet at a step are fitted to the curve by least squares, for each "
    "step with at least three points on either side, and the best fit is taken. It is marked only where the Bayesian "
    "information criterion prefers it to one straight line by more than 10 and the slope behind it is at least twice "
    "the slope before it."
)


# --- what both kinds of result say ------------------------------------------------------------------------------------


def kept(full: int, layers: int) -> str:
    return f"{full} of {layers} layers keep their indexer ({numbers.percent(full / layers)})"


def loss_change(difference: Difference, baseline: str, errors: int) -> str:
    """How the loss differs from that of `baseline`; within `errors` standard errors it is the same."""
    signed = numbers.difference(difference)
    if math.isnan(difference.std_err):
        return f"the loss changes by {signed} nats per token from {baseline} (one sequence: no standard error)"
    if abs(difference.delta) <= errors * difference.std_err:
        within = "one standard error" if difference.is_tie else "two standard errors"
        return f"the loss is that of {baseline} within {within} ({signed} nats per token)"
    amount = numbers.with_error(abs(difference.delta), difference.std_err, sign=False)
    return f"the loss {'rises' if difference.delta > 0 else 'falls'} by {amount} nats per token from {baseline}"


def uniform_change(cost: Difference, baseline: str, measurable: bool) -> str:
    """What the uniform pattern costs; `measurable` where that is told from nothing."""
    if cost.delta < -2 * cost.std_err:
        amount = numbers.with_error(-cost.delta, cost.std_err, sign=False)
        return f"{UNIFORM} has a lower loss than {baseline}, by {amount}"
    if not measurable:
        return f"{UNIFORM} costs nothing measurable ({numbers.difference(cost)})"
    verb = "costs" if cost.delta > 0 else "changes the loss by"  # one sequence: no error to hold it to
    return f"{UNIFORM} {verb} {numbers.difference(cost)}"


def no_engine(model_type: str | None) -> str:
    """Where no engine is known to share in models of a type: that, and the way in Python."""
    models = f"`{model_type}` models" if model_type else "a model of a type that the run does not say"
    return (
        f"No engine is known to take a pattern for {models}; in Python, `icsearch.load(MODEL, PATTERN)` gives the "
        "transformers model that runs it."
    )


# --- a run ------------------------------------------------------------------------------------------------------------


def headline(view: RunView) -> str:
    """The result of a run in one or two sentences."""
    if not view.points:
        return "The baseline is not scored yet: there is no result to show."
    final, lead = view.final, ""
    if not view.record.finished and view.by_similarity:
        lead = f"Not finished; {'pattern chosen' if len(view.points) > 1 else 'no pattern scored yet'}: "
    elif not view.record.finished and view.record.by_table:
        lead = f"Not finished; {_come_to(view.record)}: "
    elif not view.record.finished:
        lead = f"Not finished; after {numbers.plural(final.step, 'flip')}: "
    baseline = f"{view.baseline_name} at {numbers.loss(view.points[0].loss)}"
    change = loss_change(final.difference, baseline, errors=1)
    if final.difference == Difference(0.0, 0.0):
        change = f"that is {baseline} nats per token"
    sentences = [f"{lead}{kept(final.full, view.num_layers)}; {change}."]
    if final.kl is not None and (final.step or view.record.by_kl):
        amount = numbers.difference(final.kl, sign=False)
        told = "Chosen by the KL to {}, which comes to {}" if view.record.by_kl else "The KL to {} comes to {}"
        sentences.append(f"{told.format(view.baseline_name, amount)} nats per token.")
    reference = view.same_retention
    if reference is not None and reference.pattern != final.pattern:
        cost, avoided = reference.difference, reference.avoided
        text = uniform_change(cost, view.baseline_name, measurable=not abs(cost.delta) <= 2 * cost.std_err)
        if avoided is not None and avoided > 0:
            what = "the choice by similarity" if view.by_similarity else "the search"
            text = f"{text}: {what} avoids {'all' if avoided >= 1 else numbers.percent(avoided)} of that"
        sentences.append(f"{text}.")
    return " ".join(sentences)


def _come_to(record: RunRecord) -> str:
    """How far an unfinished search on a second-order table has come."""
    if len(record.proposals) > 1:
        return f"in round {len(record.proposals) - 1}"
    return "nested path measured" if record.commits else "path proposed" if record.proposals else "table made"


def found_where(view: RunView) -> str:
    """Whether a search on a second-order table found its pattern on the nested path or off it; empty for others."""
    record = view.record
    if record.chosen is None or view.fisher is None or (record.refinement and record.refinement.swaps):
        return ""
    found = view.final
    size = f"patterns with {found.full} F layers"
    known = view.fisher.of(found.pattern)
    if view.off_curve is None:
        rivals = len(view.fisher.finalists(found.full))
        text = f"This is the nested path’s own pattern: of {rivals} {size} that were measured, none is clearly better"
        text = text if rivals > 1 else "This is the nested path’s own pattern"
    else:
        change = record.objective.difference(found.pattern.letters, view.points[-1].pattern.letters)
        text = (
            f"This pattern is not on the nested path ({known.told if known else 'measured'}): its {view.objective} "
            f"minus that of the path’s pattern of as many F layers is {numbers.difference(change)}"
        )
    if record.heldout and not record.refinement:
        return f"{text}; held-out sequences chose among the best."
    lowest = record.ranked(each for each in record.measured() if len(each.full_layers) == found.full)[0]
    if lowest != found.pattern:
        change = record.objective.difference(found.pattern.letters, lowest.letters)
        apart = f"one standard error does not part it from the lowest loss ({numbers.difference(change)})"
        text += f"; {apart}, and its KL is lower"
    return f"{text}."


def foretold(fisher: FisherView) -> str:
    """How well the table put what was measured in order; empty for too few patterns."""
    flips, everything = fisher.ranked(FLIP), fisher.ranked()
    if everything is None:
        return ""
    told = [f"over all {everything.patterns} patterns measured, {_ranks(everything)}"]
    if flips is not None:
        told.insert(0, f"of the {flips.patterns} single flips {_ranks(flips)}")
    kls = [(known.measured.kl.delta, known.predicted.kl.delta) for known in fisher.measured]
    ratios = [measured / predicted for measured, predicted in kls if predicted]
    size = f" The measured KL is {median(ratios):.2g} times the predicted one (median)." if ratios else ""
    return f"Rank correlation of predicted and measured, where 1 is the same order: {'; '.join(told)}.{size}"


def _ranks(ranked: Ranked) -> str:
    by_kl, by_loss = ("none" if math.isnan(rank) else f"{rank:.2f}" for rank in (ranked.kl, ranked.loss))
    return f"{by_kl} by KL and {by_loss} by loss"


def table_cost(record: RunRecord) -> str:
    """What a search on a second-order table took, part by part, against what exact greedy takes."""
    cost, layers = results.cost(record), record.start["decoder_layers"]
    told = [f"{part} {numbers.count(evaluations)}" for part, evaluations in results.table_parts(record).items()]
    told = [*told, *([] if record.fisher.layer_sequences else ["the table is an earlier run’s"])]
    done, exact = cost["layer_evaluations"], cost["exact_layer_evaluations"]
    text = f"{numbers.count(done)} layer evaluations, as many as in {done / layers:.1f} forwards ({', '.join(told)})"
    if exact is None or not record.finished:
        return f"{text}."
    times = f"{exact / max(done, 1):.1f} times as many"
    return f"{text}; exact greedy takes {numbers.count(exact)} for as many flips (counted, not run), {times}."


def in_sample(view: RunView) -> str:
    """That a run's losses are no test of its pattern."""
    chose = "the similarities come from" if view.by_similarity else "the search chose by, which favours its pattern"
    text = f"In-sample: these losses are of the batches that {chose}. Confirm on held-out text with icsearch eval."
    if not view.counted_name:
        return text
    batches = view.start["calibration"]
    counted, of = sum(view.record.tokens), batches["num_sequences"] * (batches["seq_len"] - 1)
    return f"{text} Losses are over {view.counted_name} alone, {numbers.count(counted)} of {numbers.count(of)}."


def kink_sentence(view: RunView) -> str:
    """Where the curve bends, or that no clear kink is there."""
    if view.too_few_for_kink:
        return "Too few steps for a kink."
    if view.kink is None:
        return "No clear kink: two lines do not fit this curve clearly better than one, or it does not turn steeper."
    kink, at = view.kink, round(view.kink.x)
    return (
        f"The curve bends at {numbers.plural(at, 'shared layer')} ({view.num_layers - at} F left): about "
        f"{numbers.compact(kink.slope_before)} nats per token for each flip before, "
        f"{numbers.compact(kink.slope_after)} after."
    )


def tied(view: RunView) -> str:
    """What a tie is, behind the layers that are tied."""
    return (
        f"could not be told from the one committed: their {view.objective} differs from its by no more than one paired "
        "standard error"
    )


def refinement_sentence(view: RunView, refined: Refined) -> str:
    """How many moves of a refinement were scored, qualified, and made."""
    told = refined.told
    if not told.moves_scored:
        end = "this pattern has no move to score" if view.record.finished else "no move scored yet"
        return f"Swaps: {end}."
    state = "" if view.record.finished else "so far "
    lead = f"Swaps: {state}{numbers.plural(told.moves_scored, 'move')} scored in"
    rounds = len({event["pattern"] for event in told.outcomes if event["event"] == "judged"})
    lead = f"{lead} {numbers.plural(rounds, 'round')};"
    if not told.moves_qualified:
        return f"{lead} none gained more than two paired standard errors, so the pattern is the search's."
    return (
        f"{lead} {told.moves_qualified} gained more than two paired standard errors. The held-out sequences were asked "
        f"about {len(told.trials)} of these, best first: {len(refined.made)} made, {len(refined.refused)} refused."
    )


def weights_sentence(record: RunRecord) -> str:
    """Such as `8.0 MB a step, 1.00 times the checkpoint; 96.0 MB in all`; empty where weights stayed on the device."""
    read = weights_read(record)
    if not read:
        return ""
    in_all = f"{format_bytes(read['weight_bytes'])} in all"
    a_step, checkpoint = read["weight_bytes_per_step"], read["checkpoint_bytes"]
    if a_step is None:
        times = read["weight_bytes"] / checkpoint if checkpoint and record.by_table else 0
        return f"{in_all}, {times:.2f} times the checkpoint" if times else in_all
    multiple = f", {a_step / checkpoint:.2f} times the checkpoint" if checkpoint else ""
    return f"{format_bytes(a_step)} a step{multiple}; {in_all}"


def similarity_reading(view: RunView) -> tuple[str, ...]:
    """What similarity says of the chosen pattern and of the uniform one, and what the losses say."""
    similarity = view.record.similarity
    pairs = [(layer, source) for layer, source in enumerate(view.record.pattern.sources()) if layer != source]
    if similarity is None:
        return ()
    sentences = []
    if pairs:
        cosine, objective = similarity["cosine"], similarity["objective"]
        layer, source = min(pairs, key=lambda pair: cosine[pair[0]][pair[1]])
        sentences.append(
            f"Of all patterns with {len(view.record.pattern.full_layers)} F layers that this run allows, this one "
            f"keeps the attention outputs of its {numbers.plural(len(pairs), 'S layer')} most alike: their "
            f"similarities add up to {objective:.4f}, {objective / len(pairs):.4f} on average. The least alike is "
            f"layer {layer} under layer {source}'s selection, {cosine[layer][source]:.4f}."
        )
    reference = view.same_retention
    if reference is not None and len(view.points) > 1:
        uniform = next(row for row in predictions(view) if row.pattern == reference.pattern and row.difference)
        mean = f"{uniform.mean:.4f}" if uniform.mean is not None else "–"
        sentences.append(f"The uniform pattern of that size adds up to {uniform.similarity:.4f}, {mean} on average.")
        sentences.append(_similarity_outcome(reference))
    return tuple(filter(None, sentences))


def measures(view: RunView) -> tuple[str, ...]:
    """Titles of the pictures of a similarity baseline."""
    known = {"kascade": "Kascade: what is lost", "fisher": "Fisher: loss, nats per token"}
    others = (title for name, title in known.items() if name in view.record.compared)
    return "Similarity of attention outputs", *others, "Overlap of selections"


def compared_reading(view: RunView) -> tuple[str, ...]:
    """What the other measures promised of the patterns that they chose, and what was measured."""
    rows, sentences = {row.pattern.letters: row for row in predictions(view)}, []
    for name, event in view.record.compared.items():
        row = rows.get(event["pattern"])
        if row is None or row.difference is None:
            continue
        kept, foretold = numbers.exact_percent(row.kept), numbers.difference(row.foretold)
        promised = {
            "kascade": f"By Kascade’s score the pattern that it chose keeps {kept} of attention",
            "fisher": f"The second-order table predicts {foretold} for the pattern that it chose",
        }[name]
        sentences.append(
            f"{promised}; measured, its loss is {numbers.difference(row.difference)} nats per token above that of "
            f"{view.baseline_name}."
        )
    return tuple(sentences)


def _similarity_outcome(reference: Reference) -> str:
    """What the losses say of the choice; no more than two standard errors carry."""
    difference = reference.searched_minus_uniform
    if reference.searched is None or difference is None:
        return ""
    if reference.searched.pattern == reference.pattern:
        return "It is this very pattern: similarity chose the uniform one."
    measured = f"Measured, its loss minus that of uniform is {numbers.difference(difference)} nats per token"
    if math.isnan(difference.std_err):
        return f"{measured} (one sequence: no standard error)."
    if abs(difference.delta) <= 2 * difference.std_err:
        return f"{measured}, within two standard errors of nothing: more similarity did not buy a lower loss."
    if difference.delta > 0:
        return f"{measured}: more similarity, and a higher loss."
    return f"{measured}: here the choice by similarity is the better one."


def comparison_notes(views: Sequence[RunView]) -> list[str]:
    """What keeps runs from being compared directly: other models, other batches."""
    return [
        f"These runs are on different {what}: each curve is against its own baseline."
        for part, what in (("model", "models"), ("calibration", "calibration batches"))
        if len({view.start[part].get("fingerprint") for view in views}) > 1
    ]


# --- an evaluation ----------------------------------------------------------------------------------------------------


def eval_headline(view: EvalView) -> str:
    """What the evaluation says of the best pattern at the smallest retention."""
    best = next(iter(view.smallest), None)
    loss = numbers.loss(view.baseline.loss)
    if best is None and len(view.rows) == 1:
        return f"Only {view.baseline_name} was evaluated: a loss of {loss} nats per token."
    if best is None:
        return f"{numbers.plural(len(view.rows), 'pattern')} evaluated."
    change = loss_change(best.difference, f"{view.baseline_name} at {loss}", errors=2)
    if abs(best.difference.delta) <= 2 * best.difference.std_err and not excludes_clear_loss(best.difference):
        change += ": too few tokens to exclude a clear loss"
    sentences = [f"With the pattern “{best.name}”, {kept(best.full, view.num_layers)} and {change}."]
    if (gap := view.gap_of(best)) is not None:
        sentences.append(_gap_sentence(gap, view.baseline_name))
    if best.all_tokens is not None:
        cost = numbers.difference(best.all_tokens.difference)
        sentences.append(f"That is over {view.counted_name} alone; over all tokens it is {cost}.")
    if best.in_sample:
        sentences.append(f"In-sample: it was {SEARCHED_HERE}.")
    if best.foreign:
        sentences.append("The pattern was found on another model.")
    return " ".join(sentences)


def _gap_sentence(gap: Gap, baseline: str) -> str:
    text = uniform_change(gap.uniform.difference, baseline, measurable=gap.closed is not None)
    if gap.closed is None:
        return f"{text}: there is no gap to close."
    share = numbers.share(gap.closed)
    if gap.closed.delta > max(1.0, 2 * gap.closed.std_err):
        return f"{text}: all of that gap is closed ({share})."
    if abs(gap.closed.delta) <= 2 * gap.closed.std_err:
        return f"{text}: {share} of that gap is closed, within two standard errors of nothing."
    return f"{text}: {share} of that gap is closed{'' if gap.closed.delta > 0 else ': uniform is better'}."


def gap_closed(gap: Gap) -> str:
    """The share of the gap that a pattern closes, or why there is none to close."""
    if gap.closed is not None:
        return numbers.share(gap.closed)
    cost = gap.uniform.difference
    better = cost.delta < -2 * cost.std_err
    return "uniform has a lower loss than all F" if better else "uniform costs nothing measurable"


def badges(row: EvalRow) -> tuple[str, ...]:
    """What a reader must know of a row before its numbers."""
    return tuple(text for text, given in ((IN_SAMPLE, row.in_sample), (FOREIGN, row.foreign)) if given)


def eval_warnings(view: EvalView) -> tuple[str, ...]:
    """Which patterns the evaluation is no test of, and which were found elsewhere."""
    here = ", ".join(row.name for row in view.rows if row.in_sample)
    elsewhere = ", ".join(row.name for row in view.rows if row.foreign)
    told = [f"In-sample: {here}. {SEARCHED_HERE.capitalize()}: held-out text would show a higher loss."] if here else []
    return (*told, *([f"{FOUND_ELSEWHERE.capitalize()}: {elsewhere}."] if elsewhere else []))


def best_of(view: EvalView) -> str:
    """That the best was chosen by the very losses shown, which favours it; empty where there was no choice."""
    count = len(view.smallest)
    if count < 2:
        return ""
    return f"The best of {count} patterns of that size by these very losses, which favours it a little."


def overlap_summary(row: EvalRow) -> str:
    """``4 F · overlap 71%, lowest 38% (layer 9)``, or the number of F layers where none was measured."""
    if not row.overlap:
        return f"{row.full} F"
    mean = sum(row.overlap.values()) / len(row.overlap)
    lowest, layer = min((share, layer) for layer, share in row.overlap.items())
    return f"{row.full} F · overlap {numbers.percent(mean)}, lowest {numbers.percent(lowest)} (layer {layer})"


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def memory_sentences(view: EvalView) -> list[str]:
    """What serving each pattern frees, by what eval.json counted; patterns that free the same together."""
    freed: dict[str, list[str]] = {}
    for cost in view.document.get("cost_rows") or ():
        saved = cost.get("saved") or {}
        keys, per_token, weights = (saved.get(name) or 0 for name in ("index_keys", "per_token", "index_weights"))
        if keys > 0:
            token, cache, indexers = (format_bytes(round(size)) for size in (keys, per_token, weights))
            more = per_token / (per_token - keys) - 1
            what = (
                f"{token} of the {cache} that a token takes in the cache ({numbers.percent(more)} more tokens in the "
                f"same memory), and {indexers} of indexer weights"
            )
            freed.setdefault(what, []).append(f"“{cost['name']}”")
    told = [f"Served, {listed(names)} {'free' if names[1:] else 'frees'} {what}." for what, names in freed.items()]
    if told:
        model_type = str((view.document.get("model") or {}).get("model_type"))
        known = LOAD_WITHOUT_INDEXERS.get(model_type, [])
        those = f"{listed(known)} (of {model_type})" if known else f"none is known to, for {model_type}"
        told.append(f"That is so in engines that build no indexer for an S layer: {those}. Latents in 16 bits.")
    return told
