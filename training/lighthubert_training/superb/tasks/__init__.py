"""Tasks that train a head. Query by example trains nothing, and is in `superb.query_by_example`."""

from lighthubert_training.superb.tasks.base import (
    EmotionRecognition,
    IntentClassification,
    KeywordSpotting,
    SpeakerIdentification,
    Task,
)
from lighthubert_training.superb.tasks.diarization import Diarization
from lighthubert_training.superb.tasks.speaker_verification import SpeakerVerification
from lighthubert_training.superb.tasks.transcription import PhoneRecognition, SlotFilling, SpeechRecognition


TASKS: dict[str, type[Task]] = {
    "asr": SpeechRecognition,
    "asv": SpeakerVerification,
    "er": EmotionRecognition,
    "ic": IntentClassification,
    "ks": KeywordSpotting,
    "pr": PhoneRecognition,
    "sd": Diarization,
    "sf": SlotFilling,
    "sid": SpeakerIdentification,
}
"""By the names of their recipes."""
