"""What an ONNX file in fp32 or in 8 bits writes, against PyTorch: error rates and sizes.

for seed in 0 1 2; do python demo/run_demo.py --seed $seed --output_dir demo/output/seed-$seed; done
python benchmarks/onnx_transcripts.py demo/output/seed-?/asr --test_file demo/output/seed-0/data/test-strings.parquet
"""

import argparse
import tempfile
from pathlib import Path

from comparisons import summary
from transformers import Wav2Vec2Processor
from transformers.utils import logging

from lighthubert_training.data.audio import load_waveform
from lighthubert_training.data.strings import SAMPLING_RATE, read_parquet
from lighthubert_training.error_rates import character_error_rate, word_error_rate
from lighthubert_training.recognition.recognizer import Recognizer
from lighthubert_training.runs.tables import markdown_table
from modeling_lighthubert.errors import run
from modeling_lighthubert.loading import load_model
from modeling_lighthubert.onnx_export import to_onnx


FORMS = ("PyTorch, fp32", "ONNX, fp32", "ONNX, int8")


def files(model: Path, folder: Path) -> dict[str, Path]:
    """What a `Recognizer` is made of in each form. ONNX files are written to `folder`."""
    loaded = load_model(model)
    to_onnx(loaded, folder)
    to_onnx(loaded, folder, quantize="int8")
    Wav2Vec2Processor.from_pretrained(model).save_pretrained(folder)
    return dict(zip(FORMS, (model, folder / "model.onnx", folder / "model_int8.onnx"), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="Fine-tuned models, of several seeds.")
    parser.add_argument("--test_file", required=True, help="Parquet file with the columns audio and text.")
    options = parser.parse_args()
    logging.set_verbosity_error()
    rows = read_parquet(options.test_file)
    waveforms, references = [load_waveform(audio, SAMPLING_RATE) for audio in rows["audio"]], list(rows["text"])
    found: dict[str, list[tuple[float, float, float]]] = {form: [] for form in FORMS}
    for model in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            for form, file in files(model, Path(scratch)).items():
                texts = [each.text for each in Recognizer.from_pretrained(file).transcribe(waveforms)]
                size = (file / "model.safetensors" if file.is_dir() else file).stat().st_size / 2**20
                cer, wer = character_error_rate(references, texts), word_error_rate(references, texts)
                found[form].append((cer, wer, size))
    reference = [cer for cer, _, _ in found[FORMS[0]]]
    lines = []
    for form, measured in found.items():
        cers, wers, sizes = zip(*measured)
        worse = max(cer - other for cer, other in zip(cers, reference, strict=True))
        rates = [summary(values, percent=True) for values in (cers, wers)]
        lines.append([form, *rates, f"{100 * worse:+.2f}", f"{max(sizes):.2f}"])
    header = ("", "CER, %", "WER, %", "CER against PyTorch, points, the worst seed", "MiB")
    print(f"{len(references)} recordings, {len(options.models)} models\n\n{markdown_table(header, lines)}")


if __name__ == "__main__":
    run(main)
