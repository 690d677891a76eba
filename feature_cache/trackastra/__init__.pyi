from .dataset import CachedConcatDataset as CachedConcatDataset
from .dataset import CachedCTCData as CachedCTCData
from .dataset import wrap as wrap
from .examples import EXAMPLES as EXAMPLES
from .examples import write_example as write_example
from .shallow import SHALLOW_FEATURES as SHALLOW_FEATURES
