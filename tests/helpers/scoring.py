"""Pairs of answers and references."""

# Pairs of (prediction, reference) that the libraries can be given as they are.
PAIRS = [
    ("今天天气很好,适合出门散步。", "今天天气不错,很适合出去散步。"),
    ("发动机无法启动,需要检查电池。", "发动机无法启动,需要检查电池。"),
    ("水泵_故障_漏水\n阀门_部件_密封圈", "水泵_故障_漏水\n阀门_故障_卡死"),
    ("好", "好"),
    ("北京", "北京"),
    ("上海", "完全不同的一句话"),
    ("他说:“不知道。”然后走了……真的吗?是的!", "他说“知道。”真的吗?不是。............完"),
    ("重复重复重复重复", "重复一次就够"),
    ("The pump leaks, 检查 seal 12.5%", "The pump leaks: 更换 seal 12.5%"),
]
PREDICTIONS = [prediction for prediction, _ in PAIRS]
REFERENCES = [reference for _, reference in PAIRS]
