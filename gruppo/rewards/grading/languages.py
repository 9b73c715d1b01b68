"""How other languages state the answer to a multiple-choice question. English and Chinese are in `choices`.

In a phrase, IT stands for the letters that are chosen and OTHER for letters that are not; a space is any white space. A
phrase with OTHER is a contrast ("not A but B"). Phrases are regular expressions without regard to case.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Language(NamedTuple):
    """Phrases that state the answer, words that deny a clause ("not"), and words that leave a sentence open ("if")."""

    phrases: tuple[str, ...]
    denials: str
    doubts: str


# Words before a letter: "Option B", "la opción B", "選択肢B".
OPTION = (
    r"(?:(?:la|les?|el|los|il|lo|die|der|das|den|de|het|o|as?) |l['’])?"
    r"(?:(?:option|choix|opción|opzione|opção|optie|alternativ(?:et?|a)?|alternatief|opcja|wariant|вариант|buchstabe|"
    r"lettre|letra|lettera|letter|réponse|proposition|antwort|respuesta|risposta|resposta|antwoord|svar|ответ|"
    r"phương án|đáp án|câu|pilihan|opsi|الخيار|विकल्प) |選択肢 ?|보기 ?|선택지 ?|ตัวเลือก ?|ข้อ ?)?"
)


AND = r"\b(?:und|et|y|e|en|och|oraz|и|ve|và|dan)\b|と|和|과|와|และ|و|और"


NO = r"\b(?:non|nein|no|não|nee|nej|нет|hayır)\b|いや|아니|ไม่|không|bukan|لا|नहीं"


OR = (
    r"\b(?:oder|ou|o|u|of|eller|lub|albo|или|либо|veya|hoặc|hay|atau)\b|ya da|または|もしくは|(?<=[A-Z])か|또는|이나|"
    r"หรือ|أو|या"
)


LANGUAGES = {
    "French": Language(
        (
            r"\br[ée]ponse(?: (?:correcte|exacte|juste|finale))? (?:est|serait|doit être)(?: donc)? IT",
            r"\b(?:c['’]est|il s['’]agit)(?: donc)?(?: bien)? (?:de )?(?:la )?r[ée]ponse IT",
            r"IT (?:est|sont)(?: donc)? (?:(?:la|les) (?:bonnes? |seules? )?réponses?|correcte?s?|exacte?s?|justes?)\b",
            r"\bn['’]est pas OTHER,? (?:mais|c['’]est) IT",
            r"\bnon(?: pas)? OTHER,? mais IT",
            r"\bdonc,? (?:c['’]est )?IT$",
        ),
        r"\bn['’]|\b(?:ne|pas|jamais|ni|aucune?|fausses?|mauvaise?s?|incorrectes?|inexactes?)\b"
        r"|\best (?:faux|incorrect|inexact)\b",
        r"\b(?:si|peut-être|sinon)\b",
    ),
    "German": Language(
        (
            r"\b(?:antwort|lösung|option|auswahl)(?: (?:ist|lautet|wäre)| muss)(?: (?:also|daher|somit|demnach))?:? IT",
            r"\b(?:richtig|korrekt|zutreffend) (?:ist|sind)(?: (?:also|daher|somit|nur))?:? IT",
            r"IT (?:ist|sind|wäre) (?:also |daher |somit )?(?:die |der )?(?:einzig |einzige )?"
            r"(?:richtig|korrekt|zutreffend|lösung|antwort)",
            r"\b(?:daher|deshalb|somit|also|demnach) ist IT (?:richtig|korrekt|die (?:richtige |korrekte )?antwort)",
            r"\bnicht OTHER,? sondern IT",
            r"\b(?:daher|deshalb|somit|folglich|demnach) IT$",
            r"\b(?:falsch|richtig|nicht|ausgeschlossen|scheidet aus),? also IT$",
        ),
        r"\b(?:nicht|kein\w*|falsch\w*|nie|niemals|weder|inkorrekt\w*|unzutreffend)\b",
        r"\b(?:wenn|falls|ob|vielleicht|möglicherweise|angenommen)\b",
    ),
    "Spanish": Language(
        (
            r"\brespuesta(?: (?:correcta|final))? (?:es|sería|debe ser)(?: entonces)?:? IT",
            r"\b(?:opción|alternativa) correcta es:? IT",
            r"IT (?:es|son) (?:(?:la|las) (?:respuestas? )?)?correctas?\b",
            r"IT es la (?:respuesta|solución)\b",
            r"\bno(?: es)? OTHER,? sino IT",
            r"\b(?:por (?:lo )?tanto|entonces|así que),? IT$",
        ),
        r"\bno (?:es|son|era|puede|sería|hay|se|creo|la|el)\b|\b(?:nunca|tampoco|incorrect[ao]s?|fals[ao]s?)\b",
        r"\b(?:si|quizás?|tal vez|acaso)\b",
    ),
    "Italian": Language(
        (
            r"\brisposta(?: (?:corretta|giusta|esatta|finale))? (?:è|sarebbe|deve essere)(?: quindi)?:? IT",
            r"\b(?:opzione|alternativa) (?:corretta|giusta) è:? IT",
            r"IT è (?:(?:la )?risposta|(?:la )?(?:corretta|giusta|esatta))\b",
            r"\bnon(?: è)? OTHER,? (?:ma|bensì) IT",
            r"\b(?:quindi|dunque|perciò),? IT$",
        ),
        r"\bnon (?:è|sono|può|era|sarebbe|la|il|lo|si|credo)\b|\b(?:né|errat[ao]|sbagliat[ao]|scorrett[ao]|fals[ao])\b",
        r"\b(?:se|forse)\b",
    ),
    "Portuguese": Language(
        (
            r"\bresposta(?: (?:correta|certa|final))? (?:é|seria|deve ser)(?: portanto)?:? IT",
            r"\b(?:opção|alternativa) (?:correta|certa) é:? IT",
            r"IT (?:é|está) (?:a )?(?:resposta|corret[ao]|cert[ao])\b",
            r"\bnão(?: é)? OTHER,? (?:mas|e)(?: sim)? IT",
            r"\bportanto,? IT$",
        ),
        r"\b(?:não|nunca|nem|errad[ao]s?|incorret[ao]s?|fals[ao]s?)\b",
        r"\b(?:se|talvez)\b",
    ),
    "Dutch": Language(
        (
            r"\bantwoord (?:is|luidt|moet zijn)(?: dus)?:? IT",
            r"IT is (?:dus )?(?:het )?(?:juist|goed|correct|antwoord)(?:e)?\b",
            r"\bniet OTHER,? maar IT",
            r"\b(?:dus|daarom),? IT$",
        ),
        r"\b(?:niet|geen|nooit|onjuist\w*|foute?|onwaar|verkeerd\w*)\b",
        r"\b(?:als|indien|misschien|mogelijk)\b",
    ),
    "Swedish": Language(
        (
            r"\bsvaret (?:är|blir|måste vara)(?: alltså)?:? IT",
            r"\brätt (?:svar|alternativ) är:? IT",
            r"IT är (?:det )?(?:rätta?|korrekta?|svaret)\b",
            r"\binte OTHER,? utan IT",
            r"\balltså,? IT$",
        ),
        r"\b(?:inte|ej|aldrig|ingen|inget|fel|felaktig\w*|falsk\w*)\b",
        r"\b(?:om|kanske|möjligen)\b",
    ),
    "Polish": Language(
        (
            r"\bodpowied(?:ź|zią|zi)(?: to| jest| brzmi| końcowa to)?:? IT",
            r"IT jest (?:prawidłow|poprawn|właściw)(?:a|ą|e)\b",
            r"\bnie OTHER,? (?:lecz|ale|tylko) IT",
            r"\b(?:więc|zatem|dlatego),? IT$",
        ),
        r"\b(?:nie\w*|błędn\w+|fałszyw\w+|żadn\w+|ani)\b",
        r"\b(?:jeśli|jeżeli|czy|może|gdyby)\b",
    ),
    "Russian": Language(
        (
            r"\bответ(?:ом)?(?: (?:это|является|будет))? ?[-–—:]? ?IT",
            r"\b(?:верен|верный|правильный|правилен) (?:вариант|ответ)? ?[-–—:]? ?IT",
            r"IT ?[-–—]? ?(?:(?:является )?(?:правильн|верн)\w+)",
            r"\bне OTHER,? а IT",
            r"\b(?:значит|следовательно|поэтому|итак),? IT$",
        ),
        r"\b(?:не\w*|ни|ложн\w+|ошибочн\w+)\b",
        r"\b(?:если|ли|может|возможно)\b",
    ),
    "Turkish": Language(
        (r"\b(?:cevap|yanıt|cevabı?|yanıtı?):? IT", r"IT(?: şıkkı| seçeneği)? doğru(?:dur|\b)", r"OTHER değil,? IT"),
        r"değil|\b(?:yanlış\w*|hatalı\w*|olamaz)\b",
        r"\b(?:eğer|belki)\b",
    ),
    "Japanese": Language(
        (
            r"(?<!不)(?:正解|答え|解答|正答|回答)(?:は|が)、? ?IT",
            r"IT(?:が|は)(?:正解|正しい|答え)",
            r"OTHERでは?なく、?IT",
        ),
        r"では?な|じゃな|ません|ない|誤|間違|不正|違",
        r"もし|なら|かもしれ|でしょうか",
    ),
    "Korean": Language(
        (
            r"(?<!오)(?:정답|답|답안)(?:은|이)? IT",
            r"IT(?:이|가|은|는)? (?:정답|맞|옳)",
            r"OTHER(?:이|가)? 아니라,? IT",
        ),
        r"아니|아닌|아닙|않|틀[리렸린]|못|오답",
        r"만약|라면|아마|일까",
    ),
    "Thai": Language(
        (
            r"คำตอบ(?:ที่ถูกต้อง|ที่ถูก|สุดท้าย)? ?(?:คือ|เป็น) ?IT",
            r"IT ?(?:ถูกต้อง|เป็นคำตอบ|คือคำตอบ)",
            r"ไม่ใช่ ?OTHER ?แต่(?:เป็น|คือ) ?IT",
        ),
        r"ไม่|มิใช่|ผิด",
        r"ถ้า|หาก|อาจ",
    ),
    "Vietnamese": Language(
        (
            r"(?:đáp án|câu trả lời|phương án)(?: đúng)?(?: cuối cùng)? là:? IT",
            r"IT là (?:đáp án|câu trả lời|phương án)",
            r"\bchọn IT",
            r"không phải(?: là)? OTHER,? mà là IT",
        ),
        r"\b(?:không|sai|chẳng|chưa)\b",
        r"\b(?:nếu|có lẽ|có thể)\b",
    ),
    "Indonesian": Language(
        (
            r"\bjawaban(?:nya)?(?: yang)?(?: (?:benar|tepat|akhir))?(?:nya)? adalah:? IT",
            r"IT adalah (?:jawaban|pilihan) yang (?:benar|tepat)",
            r"\bbukan OTHER,? (?:melainkan|tetapi|tapi) IT",
        ),
        r"\b(?:bukan\w*|tidak|salah|tak)\b",
        r"\b(?:jika|kalau|mungkin|apakah)\b",
    ),
    "Arabic": Language(
        (
            r"(?:الجواب|الإجابة|الاجابة)(?: (?:الصحيح|الصحيحة|النهائي|النهائية))? (?:هو|هي):? IT",
            r"IT (?:هو|هي) (?:الجواب|الإجابة|الصحيح)",
            r"ليست? OTHER،? بل IT",
        ),
        r"ليس|\bلا\b|\bلن\b|\bلم\b|غير|خطأ|خاطئ",
        r"إذا|\bلو\b|ربما|\bهل\b",
    ),
    "Hindi": Language(
        (r"उत्तर IT(?= है)", r"IT (?:सही|सही उत्तर|उत्तर) है", r"OTHER नहीं,? बल्कि IT"),
        r"नहीं|गलत|ग़लत",
        r"यदि|अगर|शायद|क्या",
    ),
}  # fmt: skip


# A denial in any of these languages. "Ne" and "Ni" are elements too.
DENIED = re.compile(rf"(?!N[ei]\b)(?i:{'|'.join(language.denials for language in LANGUAGES.values())})")
