"""`measure_moments`: one pass over a corpus, in independent shards, becomes the second moments of a base."""

from prefect import flow

from tasks._progress import show_rate
from tasks._spreading import spread
from tasks.measuring import SHARDS, TOKENS, find_measured, plan_moments, pool_shards, sum_shard


@flow(name="measure-moments", timeout_seconds=7 * 24 * 3600)
def measure_moments(base: str, layers: list[int], corpus: str, tokens: int = TOKENS, shards: int = SHARDS, seed: int = 0) -> str:
    """Measure second moments. May be killed anywhere: the next run with the same arguments goes on with the shards that are stored.

    Args:
        base: digest of one that the root holds.
        layers: whose keys are counted, all in one pass.
        corpus: a file or folder (`errata.corpus.open_corpus`), or a name of `errata.corpus`.
        tokens: keys to count, as long as there is text.
        shards: independent parts, spread as `compute.runner` says. Other numbers of shards read other samples.
        seed: of the order in which the corpus is read.

    Returns:
        The digest of the moments; their report says what more tokens would change.
    """
    plan = plan_moments(base, layers, corpus, tokens, shards, seed)
    if (known := find_measured(plan)) is not None:
        return known
    with show_rate("second moments", "tokens", plan.tokens) as tell:
        calls = [{"plan": plan, "shard": shard} for shard in range(plan.shards)]
        spread(sum_shard, calls, on_step=tell, on_result=lambda record: tell(record.shard, record.tokens))
    return pool_shards(plan)
