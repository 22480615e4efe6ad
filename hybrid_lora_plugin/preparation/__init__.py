"""Data sets as verl trains and validates on them, and as the probe and SFT read them.

runner            all of it, in order, in parts that an interruption cannot spoil
sets              what each set gives: which rows, and what a row becomes
mixture           Mixture-of-Thoughts: a conversation, and the problem in it if its answer can be checked
code_tests        tests for a code question, from a set that has some
reading           rows of files, folders and the hub, from any row on
questions         when two questions are the same, and which are held out
contamination     questions that an evaluation set has too
table             rows and columns of the files that are written
parts             what is kept between an interruption and the same command
datasheet         what is said beside the data
"""
