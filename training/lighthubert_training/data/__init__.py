"""Speech: where it comes from, how it is read, and how it is put into batches."""
