"""Five structures of the Fisher information with one contract."""

from .dense import DenseFisher as DenseFisher
from .dense import dense_fisher as dense_fisher
from .diagonal import DiagonalFisher as DiagonalFisher
from .diagonal import diagonal_fisher as diagonal_fisher
from .implicit import ImplicitFisher as ImplicitFisher
from .implicit import implicit_fisher as implicit_fisher
from .kronecker import KroneckerFisher as KroneckerFisher
from .kronecker import kronecker_fisher as kronecker_fisher
from .low_rank import LowRankFisher as LowRankFisher
from .low_rank import low_rank_fisher as low_rank_fisher
from .observed import observed_information as observed_information
