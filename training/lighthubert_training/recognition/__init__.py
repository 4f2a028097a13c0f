"""Fine-tuning with CTC, and transcribing."""
