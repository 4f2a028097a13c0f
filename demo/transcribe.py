"""Transcribes recordings with a saved model and transformers alone: the code in the model's folder is all it needs.

python demo/transcribe.py demo/output/asr demo/output/data/test-strings.parquet

Our packages cannot be imported here, even where they are installed.
"""

import argparse
import io
import json
import sys
from pathlib import Path

import jiwer
import soundfile
import soxr
from datasets import Audio, disable_progress_bars, load_dataset
from transformers import pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Folder of a fine-tuned model.")
    parser.add_argument("test_file", help="Parquet file with `audio` and `text`.")
    parser.add_argument("--output_file", type=Path, help="JSON file for the transcripts and error rates.")
    parser.add_argument("--num_shown", type=int, default=8, help="Transcripts to print (default: 8).")
    options = parser.parse_args()
    for path in (options.model, options.test_file):
        if not Path(path).exists():
            parser.error(f"{path} does not exist")
    sys.modules.update(dict.fromkeys(("modeling_lighthubert", "lighthubert_training")))  # None: importing them fails
    disable_progress_bars()
    recordings = load_dataset("parquet", data_files=options.test_file, split="train")
    recordings = recordings.cast_column("audio", Audio(decode=False))
    recogniser = pipeline("automatic-speech-recognition", model=options.model, trust_remote_code=True)
    waveforms = []
    for audio in recordings["audio"]:
        waveform, rate = soundfile.read(io.BytesIO(audio["bytes"]), dtype="float32", always_2d=True)
        waveforms.append(soxr.resample(waveform.mean(axis=1), rate, recogniser.feature_extractor.sampling_rate))
    hypotheses = [output["text"] for output in recogniser(waveforms, batch_size=8)]
    references = list(recordings["text"])
    for reference, hypothesis in list(zip(references, hypotheses, strict=True))[: options.num_shown]:
        print(f"  {reference:<34} | {hypothesis}")
    results = {"wer": jiwer.wer(references, hypotheses), "cer": jiwer.cer(references, hypotheses)}
    results["num_recordings"] = len(references)
    print(f"  {len(references)} recordings: WER {results['wer']:.1%}, CER {results['cer']:.1%}")
    if options.output_file is not None:
        pairs = zip(references, hypotheses, strict=True)
        results["transcripts"] = [{"reference": text, "hypothesis": found} for text, found in pairs]
        text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
        options.output_file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
