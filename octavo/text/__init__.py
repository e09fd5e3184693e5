"""Words: text to token ids and back, chat templates, and results as a caller reads them. Free of torch."""
