"""Where the names are that Tersor takes from `transformers` itself: pyright would read every model to find them.

The types are those of the installed package. `tests/test_imports.py` holds each name against it.
"""

from transformers import cache_utils as cache_utils
from transformers.cache_utils import Cache as Cache, DynamicCache as DynamicCache, StaticCache as StaticCache
from transformers.configuration_utils import PretrainedConfig as PretrainedConfig
from transformers.generation.configuration_utils import CompileConfig as CompileConfig, GenerationConfig as GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList as LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList as StoppingCriteriaList
from transformers.generation.utils import GenerationMixin as GenerationMixin
from transformers.masking_utils import AttentionMaskInterface as AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface as AttentionInterface, PreTrainedModel as PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig as AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM as AutoModelForCausalLM
from transformers.models.auto.tokenization_auto import AutoTokenizer as AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase as PreTrainedTokenizerBase

__version__: str
