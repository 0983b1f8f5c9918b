"""Fisher information, computed three independent ways and never confused with anything else."""

from .batches import Batches as Batches
from .bounds import conditional_information as conditional_information
from .bounds import cramer_rao as cramer_rao
from .bounds import marginal_information as marginal_information
from .bounds import reparametrize as reparametrize
from .distributions import from_log_prob as from_log_prob
from .hellinger import hellinger_distance as hellinger_distance
from .hellinger import hellinger_embedding as hellinger_embedding
from .hellinger import hellinger_jacobian as hellinger_jacobian
from .inference import Information as Information
from .inference import information as information
from .kl import kl_curvature as kl_curvature
from .kl import kl_divergence as kl_divergence
from .laplace import LaplacePosterior as LaplacePosterior
from .laplace import laplace as laplace
from .laplace import load_posterior as load_posterior
from .laplace import tune_prior as tune_prior
from .law import Data as Data
from .law import Exact as Exact
from .law import MonteCarlo as MonteCarlo
from .layers import linear_layers as linear_layers
from .levenberg_marquardt import LevenbergMarquardt as LevenbergMarquardt
from .model import parameter_names as parameter_names
from .natural_gradient import NaturalGradientState as NaturalGradientState
from .natural_gradient import natural_gradient as natural_gradient
from .operators import dense_fisher as dense_fisher
from .operators import diagonal_fisher as diagonal_fisher
from .operators import implicit_fisher as implicit_fisher
from .operators import kronecker_fisher as kronecker_fisher
from .operators import low_rank_fisher as low_rank_fisher
from .operators import observed_information as observed_information
from .score import expected_hessian as expected_hessian
from .score import score as score
from .score import score_covariance as score_covariance
from .scoring import fisher_scoring as fisher_scoring
from .separation import separating_direction as separating_direction

__version__ = "0.1.0"
