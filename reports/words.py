"""The words of compare.py's report in English and in Chinese."""

LANGUAGES = ("en", "zh")


class Words:
    """Says a text in a language. The English text is the key; {names} in it are filled in."""

    def __init__(self, language: str = "en") -> None:
        self.language = language

    def __call__(self, text: str, **values: object) -> str:
        return (ZH[text] if self.language == "zh" else text).format(**values)


ENGLISH = Words()
ZH = {
    # The page.
    "Comparison: {name}": "方法比较：{name}",
    "Which method is best for this task? Written {time}.": "哪种方法最适合这个任务？写于 {time}。",
    "Methods": "各种方法",
    "Pictures": "图",
    "All metrics": "全部指标",
    "Sample rows": "数据示例",
    "Evenly spaced in the test rows; the answers are those of the first seed.": (
        "在测试数据中等距选取；回答来自第一个随机种子。"
    ),
    "Row {number}": "第 {number} 行",
    "reference": "参考答案",
    "(empty)": "（空）",
    "How to read it": "怎样读这份报告",
    "What was compared, on what": "比较了什么，在哪里运行",
    "Commands": "命令",
    "All commands, in order": "全部命令，按顺序",
    "{metric} on the test rows, with the 95 % intervals over rows": "测试数据上的 {metric}，以及对数据行的 95 % 区间",
    "Training loss of all runs": "各次训练的损失",
    "time of a training": "训练时间",
    "peak memory": "内存（显存）峰值",
    "minutes": "分钟",
    "GB": "GB",
    "update": "更新次数",
    "loss per supervised token": "每个有监督 token 的损失",
    "{metric} against {cost}": "{metric} 与{cost}",
    # The answer.
    "No method has been trained and scored yet.": "还没有任何方法训练并打分完毕。",
    "Best: {name}, {metric} {value} on {rows} test rows.": (
        "最好的是 {name}：{rows} 行测试数据上 {metric} 为 {value}。"
    ),
    "The base model has {value}; the difference is {change}.": "基座模型为 {value}，相差 {change}。",
    "With these {rows} rows it cannot be told apart from {names}: more test rows or seeds would.": (
        "只凭这 {rows} 行数据，不能把它与 {names} 区分开；需要更多测试数据或随机种子。"
    ),
    "Its lead over every other method is larger than the noise of the test rows.": (
        "它对其他每种方法的领先都大于测试数据的噪声。"
    ),
    "Forgetting: the loss on general questions rose by more than the noise with {names}.": (
        "遗忘：{names} 在通用问题上的损失上升超出了噪声。"
    ),
    "Without figures: {names}.": "没有数据：{names}。",
    "Of these, {parts}.": "其中{parts}。",
    "trains fastest ({value})": "训练最快（{value}）",
    "takes the least memory ({value})": "占内存（显存）最少（{value}）",
    "{name} {what}": " {name} {what}",
    " and ": "、",
    ", ": "、",
    "; ": "；",
    # How to read it.
    (
        "Intervals hold the middle 95 % of a bootstrap over the test rows: how far a figure would move with other "
        "rows of the same kind. Differences are paired: both methods answer the same resampled rows. Inside the "
        "noise: the interval of the difference includes 0."
    ): (
        "区间是对测试数据做自助法所得数值的中间 95 %：换一批同类数据，数值会变动多少。差值是成对的：两种方法回答同"
        "一批重采样的数据。“噪声之内”指差值的区间包含 0。"
    ),
    (
        "They say nothing of another training run: for that, give several seeds; ± is then the standard deviation "
        "over seeds, and every figure is a mean over seeds."
    ): ("区间不包括重新训练的变动：为此请给出几个随机种子，这时 ± 是种子之间的标准差，每个数值是各种子的平均。"),
    (
        "Trained: the number of weights that train. Time, tokens/s and memory are those of the training alone; "
        "memory is the peak of one process. On disk: the folder of the checkpoint."
    ): (
        "训练参数：参加训练的参数量。时间、tokens/s、内存只算训练；内存（显存）是一个进程的峰值。磁盘：检查点文件夹"
        "的大小。"
    ),
    (
        "Several values of a grid were tried on the same test rows, so the best of them looks a little better than "
        "it is: score it on other rows before you rely on the figure."
    ): (
        "网格中的几个取值用的是同一批测试数据，所以其中最好的看起来会略好于实际：采用这个数值之前，请在另一批数据上"
        "打分。"
    ),
    (
        "General loss and score are changes from the base on general questions (forgetting): the loss should not "
        "rise, the score not fall."
    ): ("通用损失、通用得分是在通用问题上相对基座的变化（遗忘）：损失不应上升，得分不应下降。"),
    # Tables.
    "method": "方法",
    "to the base": "与基座相差",
    "to the best": "与最好相差",
    "the best": "最好",
    "general loss": "通用损失",
    "general score": "通用得分",
    "trained": "训练参数",
    "tokens/s": "tokens/s",
    "memory": "内存",
    "time": "时间",
    "on disk": "磁盘",
    "{share} of {total}": "{total} 的 {share}",
    "as it is": "未经训练",
    "not known": "未知",
    "inside the noise": "噪声之内",
    ", inside the noise": "，噪声之内",
    "± {value} over {number} seeds": "± {value}（{number} 个种子）",
    "not run": "未运行",
    "begun": "已开始",
    "failed": "失败",
    "exit code {code}": "退出码 {code}",
    # What was compared.
    "base model": "基座模型",
    "training rows": "训练数据",
    "test rows": "测试数据",
    "task": "任务",
    "none": "无",
    "scoring": "打分",
    "texts as they are (no_normalize): full-width and ASCII marks differ": (
        "按原文比较（no_normalize）：全角与半角符号视为不同"
    ),
    "texts folded with NFKC: full-width and ASCII marks are alike": "两边先做 NFKC 归一：全角与半角符号视为相同",
    "seeds": "随机种子",
    "system": "系统",
    "CPU": "CPU",
    "{cpu}, {size} memory": "{cpu}，内存 {size}",
    "GPUs": "显卡",
    "versions": "版本",
    "written": "写于",
}
