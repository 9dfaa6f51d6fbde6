"""Train MMAudio, video and text to synchronised audio, in the Hugging Face ecosystem."""
