"""Worked examples for few-shot prompts, written for this project; none is of a public set."""

from __future__ import annotations

from typing import NamedTuple


class Example(NamedTuple):
    """A question, how it is worked out, and its answer. `choices`: the options of a multiple-choice question."""

    question: str
    working: str
    answer: str
    choices: tuple[str, ...] = ()


WORD_PROBLEMS = (
    Example(
        "A baker fills 7 trays with 12 rolls each and sells 59 rolls before noon. How many rolls are left?",
        "7 trays of 12 rolls are 7 * 12 = 84 rolls. After 59 are sold, 84 - 59 = 25 rolls are left.",
        "25",
    ),
    Example(
        "Nadia rides 9 km to work and the same way back, on 5 days a week. How many kilometres does she ride in 4 "
        "weeks?",
        "A day is 9 + 9 = 18 km. A week is 18 * 5 = 90 km. In 4 weeks she rides 90 * 4 = 360 km.",
        "360",
    ),
    Example(
        "A jacket costs $80. In a sale its price is lowered by 15%. What does it cost in the sale?",
        "15% of $80 is 80 * 0.15 = $12. In the sale it costs 80 - 12 = $68.",
        "68",
    ),
    Example(
        "Pavel is three times as old as his sister. Together they are 24 years old. How old is Pavel?",
        "Their ages are 1 part and 3 parts, 4 parts together. One part is 24 / 4 = 6 years. Pavel is 3 * 6 = 18.",
        "18",
    ),
    Example(
        "A tank holds 450 litres and is two thirds full. How many litres have to be added to fill it?",
        "Two thirds of 450 are 450 / 3 * 2 = 300 litres. 450 - 300 = 150 litres have to be added.",
        "150",
    ),
    Example(
        "For a party Lea buys 6 bottles of juice at $2.50 each and 3 cakes at $14 each. She pays with a $100 note. How "
        "much change does she get?",
        "The juice costs 6 * 2.50 = $15 and the cakes 3 * 14 = $42. Together that is 15 + 42 = $57. She gets back "
        "100 - 57 = $43.",
        "43",
    ),
    Example(
        "A printer makes 24 pages a minute. A second one makes half as many. How long do they take together for 540 "
        "pages, in minutes?",
        "The second printer makes 24 / 2 = 12 pages a minute. Together they make 24 + 12 = 36 pages a minute. 540 / 36 "
        "= 15 minutes.",
        "15",
    ),
    Example(
        "There are 31 students in a class. 5 more of them play chess than do not. How many play chess?",
        "Without the 5 more, 31 - 5 = 26 students are two equal groups of 26 / 2 = 13. So 13 + 5 = 18 students play "
        "chess.",
        "18",
    ),
)

COMPETITION = (
    Example(
        "What is the sum of all real numbers $x$ with $|2x - 7| = 11$?",
        "Either $2x - 7 = 11$, so $x = 9$, or $2x - 7 = -11$, so $x = -2$. Their sum is $9 + (-2) = 7$.",
        "7",
    ),
    Example(
        "A right triangle has legs of length $6$ and $9$. What is the length of the altitude to its hypotenuse?",
        "The hypotenuse is $\\sqrt{36 + 81} = 3\\sqrt{13}$. The area is $\\frac{1}{2} \\cdot 6 \\cdot 9 = 27$, and "
        "also $\\frac{1}{2} \\cdot 3\\sqrt{13} \\cdot h$. So $h = \\frac{54}{3\\sqrt{13}} = \\frac{18\\sqrt{13}}{13}$.",
        "\\frac{18\\sqrt{13}}{13}",
    ),
    Example(
        "Two fair dice are rolled. What is the probability that the larger of the two numbers is exactly $4$?",
        "Both numbers are at most $4$ in $4^2 = 16$ of the $36$ cases, and both at most $3$ in $3^2 = 9$. The larger "
        "is exactly $4$ in $16 - 9 = 7$ cases.",
        "\\frac{7}{36}",
    ),
    Example(
        "For which real numbers $x$ is $\\sqrt{x + 2} < 3$? Give the answer as an interval.",
        "The root needs $x \\ge -2$. Both sides are not negative, so they may be squared: $x + 2 < 9$, which is "
        "$x < 7$.",
        "[-2, 7)",
    ),
)

SCIENCE = (
    Example(
        "A car brakes evenly from $20 \\mathrm{~m/s}$ to rest within $50 \\mathrm{~m}$. What is the size of its "
        "acceleration, in $\\mathrm{m/s^2}$?",
        "From $v^2 = 2 a s$ follows $a = \\frac{v^2}{2 s} = \\frac{400}{100} = 4$.",
        "4",
    ),
    Example(
        "What is the energy of a photon of wavelength $500 \\mathrm{~nm}$, in joules, to two significant figures? Take "
        "$h = 6.6 \\times 10^{-34} \\mathrm{~J~s}$ and $c = 3.0 \\times 10^8 \\mathrm{~m/s}$.",
        "$E = \\frac{h c}{\\lambda} = \\frac{6.6 \\times 10^{-34} \\cdot 3.0 \\times 10^8}{5.0 \\times 10^{-7}} "
        "\\approx 4.0 \\times 10^{-19}$.",
        "4.0 \\times 10^{-19}",
    ),
    Example(
        "Solve $\\dot{x} + 3 x = 0$ with $x(0) = x_0$.",
        "The equation says that the rate of change is $-3 x$, so $x$ decays exponentially: $x(t) = x_0 e^{-3 t}$.",
        "x_0 e^{-3 t}",
    ),
    Example(
        "A firm sells at the price $p = 60 - 2 q$ and has the constant marginal cost $12$. Which quantity $q$ makes "
        "its profit largest?",
        "Revenue is $60 q - 2 q^2$, marginal revenue $60 - 4 q$. It equals $12$ at $4 q = 48$, so $q = 12$.",
        "12",
    ),
)

CHOICES = (
    Example(
        "A line passes through $(0, 3)$ and $(2, 7)$. What is its slope?",
        "The slope is $\\frac{7 - 3}{2 - 0} = 2$, which is option B.",
        "B",
        ("1", "2", "3", "4"),
    ),
    Example(
        "Which of these particles has no electric charge?",
        "Protons are positive, electrons negative, alpha particles doubly positive. A neutron has no charge: option D.",
        "D",
        ("proton", "electron", "alpha particle", "neutron"),
    ),
    Example(
        "A shop raises a price by 20% and later lowers the new price by 20%. What is the final price compared with the "
        "first one?",
        "The price is multiplied by 1.2 and then by 0.8: 1.2 * 0.8 = 0.96. It is 4% lower, which is option A.",
        "A",
        ("4% lower", "equal", "4% higher", "2% lower"),
    ),
    Example(
        "How many edges does a complete graph with 6 vertices have?",
        "Each pair of vertices is joined by one edge: 6 * 5 / 2 = 15, which is option C.",
        "C",
        ("12", "36", "15", "30"),
    ),
)

CHINESE_WORD_PROBLEMS = (
    Example(
        "书架上有5层，每层放18本书，借走了27本，还剩多少本？",
        "一共有 5 × 18 = 90 本书，借走 27 本后还剩 90 - 27 = 63 本。",
        "63",
    ),
    Example(
        "小林每分钟走70米，从家到学校走了12分钟。他家离学校多少米？",
        "路程等于速度乘以时间：70 × 12 = 840 米。",
        "840",
    ),
    Example(
        "一件衣服原价200元，打八折后再减15元，现在卖多少元？",
        "打八折是 200 × 0.8 = 160 元，再减 15 元，是 160 - 15 = 145 元。",
        "145",
    ),
    Example(
        "果园里有苹果树48棵，梨树的棵数是苹果树的四分之三。两种树一共有多少棵？",
        "梨树有 48 × 3 ÷ 4 = 36 棵，两种树一共有 48 + 36 = 84 棵。",
        "84",
    ),
    Example(
        "把96块糖平均分给一些小朋友，每人分到6块。后来又来了4个小朋友，现在一共有多少个小朋友？",
        "原来有 96 ÷ 6 = 16 个小朋友，现在有 16 + 4 = 20 个。",
        "20",
    ),
    Example(
        "一个长方形的周长是36厘米，长比宽多4厘米。它的面积是多少平方厘米？",
        "长与宽的和是 36 ÷ 2 = 18 厘米，宽是 (18 - 4) ÷ 2 = 7 厘米，长是 7 + 4 = 11 厘米，"
        "面积是 11 × 7 = 77 平方厘米。",
        "77",
    ),
)

CHINESE_BLANKS = (
    Example(
        "已知等差数列 $\\{a_n\\}$ 中 $a_2 = 5$，$a_5 = 14$，则公差 $d = (\\quad)$，$a_1 = (\\quad)$",
        "由 $a_5 - a_2 = 3d = 9$ 得 $d = 3$，于是 $a_1 = a_2 - d = 2$。",
        "3;2",
    ),
    Example(
        "函数 $f(x) = \\sqrt{4 - x^2}$ 的定义域为 $(\\quad)$",
        "需要 $4 - x^2 \\geq 0$，即 $-2 \\leq x \\leq 2$。",
        "[-2,2]",
    ),
    Example(
        "已知向量 $\\vec{a} = (2, m)$，$\\vec{b} = (3, -1)$，若 $\\vec{a} \\perp \\vec{b}$，则 $m = (\\quad)$",
        "垂直时数量积为零：$6 - m = 0$，所以 $m = 6$。",
        "6",
    ),
    Example(
        "曲线 $y = x^3$ 在点 $(1, 1)$ 处的切线方程为 $(\\quad)$",
        "$y' = 3x^2$，在 $x = 1$ 处斜率为 $3$，切线为 $y - 1 = 3(x - 1)$，即 $3x - y - 2 = 0$。",
        "3x-y-2=0",
    ),
)

CHINESE_CHOICES = (
    Example(
        "已知集合 $A = \\{1, 2, 3\\}$，$B = \\{x \\mid x > 1\\}$，则 $A \\cap B = (\\quad)$",
        "$A$ 中大于 $1$ 的元素是 $2$ 和 $3$，所以选 C。",
        "C",
        ("$\\{1\\}$", "$\\{1, 2\\}$", "$\\{2, 3\\}$", "$\\{3\\}$"),
    ),
    Example(
        "复数 $z = \\frac{2}{1 + i}$ 的虚部是 $(\\quad)$",
        "$z = \\frac{2(1 - i)}{2} = 1 - i$，虚部是 $-1$，所以选 A。",
        "A",
        ("$-1$", "$1$", "$-i$", "$i$"),
    ),
    Example(
        "若 $\\log_2 x = 5$，则 $x = (\\quad)$",
        "$x = 2^5 = 32$，所以选 D。",
        "D",
        ("$10$", "$16$", "$25$", "$32$"),
    ),
    Example(
        "（多选）下列函数中是偶函数的有 $(\\quad)$",
        "$x^2$ 与 $\\cos x$ 满足 $f(-x) = f(x)$，$x^3$ 与 $\\sin x$ 是奇函数，所以选 AC。",
        "AC",
        ("$y = x^2$", "$y = x^3$", "$y = \\cos x$", "$y = \\sin x$"),
    ),
)
