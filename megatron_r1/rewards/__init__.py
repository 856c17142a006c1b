"""Rule-based rewards: a completion's answer is extracted, judged, and mixed with the format into
one score.
"""
