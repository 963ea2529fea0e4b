"""The human study (figure S.13): a blind questionnaire, a server that collects answers, and what they say.

Two videos of one prompt stand side by side as A and B; a rater says for each of four criteria which is better, or that
there is no difference. The paper asked for the best of five at once: pairs fit a phone and are easier to judge, and
`idc.study.analysis` gives back the share of "best of all" that the paper's figure shows.
"""
