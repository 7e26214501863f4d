"""Words and marks around an answer, such as `about 5`, `**5**` and `both 1 and 2`."""

from grpo_jax.rewards.verify.spelling.rewrite import rewrite

REWRITES = (
    rewrite('**7**', '7', r'^ *(\*\*|\*|__|`)(?! )(.*[^ ])\1 *$', r'\2'),  # Markdown
    rewrite(
        r'\textbf{(E)} 15',
        '(E) 15',
        r'^\\(?:text(?:bf|rm)?|math(?:bf|rm)) *\{ *\(([A-J])\) *\} *(?=.)',
        r'(\1) ',
        needs='\\',
    ),
    rewrite(
        r'\text{The area is }12',
        '12',
        r'^\\text *\{[^{}]*(?<![A-Za-z])(?:is|are|equals|about|approximately) *\}(?=.)',
        '',
        needs='\\',
    ),
    rewrite(
        'about 25',
        '25',
        r'^(?:about|approximately|approx\.|roughly|nearly) +(?=[-0-9\\$])',
        '',
    ),
    rewrite('both 1 and 2', '1 and 2', r'^(?:\\text *\{ *)?(?:both|either) *\}? +', ''),
    rewrite(
        r'3,4,\text{ and 5}',
        r'3,4,\text{ and}5',
        r'(\\(?:text|mbox|mathrm|textrm) *\{ *,? *(?:and|or)) +([-0-9.$\\][^{}]*)\}',
        r'\1}\2',
        needs='\\',
    ),
)
