"""Trust rules: how much of the target goes to the observed token.

A rule is a small frozen object. It reads per-token statistics (``TokenStats``, one tensor [n] each) and returns γ [n],
which the caller treats as a constant: nothing here detaches. To write your own, make a class like these, or a plain
function of the statistics decorated with ``needs``.
"""

from qtarget.targets.trust.combined import Anchored, FunctionRule, OffsetMass, as_rule, needs  # noqa: F401
from qtarget.targets.trust.doubt import ConcentrationPower, Entropy, SurprisePower, TowardHalf
from qtarget.targets.trust.label import (
    AffineProbability,
    BernoulliVariance,
    ClippedProbability,
    ConfidenceGap,
    Constant,
    Focal,
    MixtureRatio,
    Probability,
    ProbabilityPower,
    ShapedProbability,
)
from qtarget.targets.trust.reference import Gibbs, ReferenceLowerMass, ReferenceProbability, ReferenceThreshold
from qtarget.targets.trust.rule import Rule  # noqa: F401
from qtarget.targets.trust.selection import ClippedRatio, ProbabilityThreshold, TokenMask, TrajectoryWeight

constant = Constant
probability = Probability
probability_power = ProbabilityPower
affine_probability = AffineProbability
clipped_probability = ClippedProbability
mixture_ratio = MixtureRatio
shaped_probability = ShapedProbability
bernoulli_variance = BernoulliVariance
confidence_gap = ConfidenceGap
focal = Focal
entropy = Entropy
surprise_power = SurprisePower
concentration_power = ConcentrationPower
toward_half = TowardHalf
probability_threshold = ProbabilityThreshold
trajectory_weight = TrajectoryWeight
token_mask = TokenMask
clipped_ratio = ClippedRatio
reference_probability = ReferenceProbability
reference_lower_mass = ReferenceLowerMass
reference_threshold = ReferenceThreshold
gibbs = Gibbs
anchored = Anchored
offset_mass = OffsetMass
