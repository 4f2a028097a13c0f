"""LightHuBERT for transformers. Importing this package registers the models with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForAudioFrameClassification,
    AutoModelForAudioXVector,
    AutoModelForCTC,
    AutoModelForPreTraining,
    AutoProcessor,
    AutoTokenizer,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)

from .configuration_lighthubert import LightHubertConfig
from .modeling_lighthubert import (
    LightHubertForAudioFrameClassification,
    LightHubertForCTC,
    LightHubertForPreTraining,
    LightHubertForSequenceClassification,
    LightHubertForXVector,
    LightHubertModel,
    LightHubertPreTrainedModel,
)
from .search_space import SearchSpace, Subnet


AutoConfig.register(LightHubertConfig.model_type, LightHubertConfig)
LightHubertConfig.register_for_auto_class()
# HuBERT's: a folder that does not name its classes, as older tools write it, is read by the type of its model
AutoFeatureExtractor.register(LightHubertConfig, Wav2Vec2FeatureExtractor)
AutoTokenizer.register(LightHubertConfig, Wav2Vec2CTCTokenizer)
AutoProcessor.register(LightHubertConfig, Wav2Vec2Processor)
for auto_class, model_class in (
    (AutoModel, LightHubertModel),
    (AutoModelForPreTraining, LightHubertForPreTraining),
    (AutoModelForCTC, LightHubertForCTC),
    (AutoModelForAudioClassification, LightHubertForSequenceClassification),
    (AutoModelForAudioFrameClassification, LightHubertForAudioFrameClassification),
    (AutoModelForAudioXVector, LightHubertForXVector),
):
    auto_class.register(LightHubertConfig, model_class)
    model_class.register_for_auto_class(auto_class.__name__)  # a saved folder carries its code

__all__ = [
    "LightHubertConfig",
    "LightHubertForAudioFrameClassification",
    "LightHubertForCTC",
    "LightHubertForPreTraining",
    "LightHubertForSequenceClassification",
    "LightHubertForXVector",
    "LightHubertModel",
    "LightHubertPreTrainedModel",
    "SearchSpace",
    "Subnet",
]
