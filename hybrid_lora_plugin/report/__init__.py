"""What people read of an allocation; nothing here decides anything.

page         report.md
caveats      its paragraph on how far to trust the choice
heatmap      layers × types, the paper's Figure 2
score_plot   all modules in the order of their score
ranking      order of preference, the cut, rank correlation
groups       modules by type and depth
compare…     two or more allocations side by side
"""
