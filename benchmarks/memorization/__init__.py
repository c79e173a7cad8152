"""Evidence: how much do plain training, IET-AGC, its parts and de-duplication remember, at which quality?"""
