"""Account of what drafts may lose against plain decoding, in plain steps.

A step of cost c that gives each row t tokens on average takes c - t longer than plain decoding would. Everything that
is not plain decoding is paid from an allowance of `ALLOWANCE` plain steps and `RATE` more with each token; what drafts
gain flows back, up to `LARGEST_GAIN`. Syncs with the host are paid from the account too. Whatever the text, decoding T
tokens so takes at most T + ALLOWANCE + RATE * T plain steps, as far as the costs are right: for 200 tokens 0.97 of
plain decoding's speed or more. Copies alone may overdraw the account, by at most `CREDIT`, after a match of
`SURE_MATCH` tokens that promises `SURE_VALUE` tokens per cost: a text that repeats itself for long, and then does not,
can lose as much more. Of several rows at a time drafts seldom gain anything, since all must gain: less is spent on
trying, `BATCH_ALLOWANCE` and `BATCH_CREDIT`.
"""

ALLOWANCE, BATCH_ALLOWANCE, RATE, LARGEST_GAIN = 5.0, 2.5, 0.005, 8.0
# Tokens per cost that copies must promise for the account to be overdrawn, tokens that must agree with the place that
# they copy from, and by how many plain steps at most.
SURE_VALUE, SURE_MATCH, CREDIT, BATCH_CREDIT = 2.0, 16, 5.0, 2.5


def most_allowed(tokens: int) -> float:
    """Plain steps that may be lost in a text of some tokens, gains left out."""
    return ALLOWANCE + CREDIT + RATE * tokens


class LossAccount:
    """Plain steps that may be lost from now on.

    Args:
        visit_cost: plain steps that a sync with the host costs.
        begin: plain steps that may be lost at the beginning.

    Attributes:
        tokens: tokens decoded so far.
        lost: plain steps lost so far; negative where drafts have gained.
    """

    def __init__(self, visit_cost: float, begin: float = ALLOWANCE) -> None:
        self.visit_cost, self.begin = visit_cost, begin
        self.tokens = self.lost = 0.0

    @property
    def balance(self) -> float:
        """Plain steps that may be lost, the next sync included."""
        return self.begin + RATE * self.tokens - self.lost

    @property
    def allowance(self) -> float:
        """Plain steps that may be lost after the next sync."""
        return self.balance - self.visit_cost

    @property
    def affords_sync(self) -> bool:
        """True where the account has more than a sync with the host costs; else nothing can be drafted."""
        return self.allowance >= 0

    @property
    def affords_sure_copies(self) -> bool:
        """True where at least copies after a long match could be drafted after a sync with the host."""
        return self.allowance + CREDIT >= 0

    def add_plain(self, tokens: float, share: float) -> None:
        """Takes in plain steps.

        Args:
            tokens: tokens that each row was given.
            share: share of the sync after them that plain decoding would not have made.
        """
        self.tokens += tokens
        self.lost += self.visit_cost * share

    def add_drafted(self, tokens: float, spent: float, share: float = 1.0) -> None:
        """Takes in drafted steps and the sync after them.

        Args:
            tokens: tokens that each row was given.
            spent: plain steps that the steps cost.
            share: share of the sync after them that plain decoding would not have made.
        """
        self.tokens += tokens
        self.lost = max(self.lost + spent + self.visit_cost * share - tokens, -LARGEST_GAIN)
