#!/usr/bin/env python3
"""Renders chat templates with transformers, as the oracle for src/data/chat.rs.

    python testdata/gen/chat_templates.py        # writes testdata/chat-templates/cases.json

The templates are short forms of what each family ships: its header and end-of-turn tokens, whether it takes a system turn, what it
trims. `idioms` uses what templates in the wild use beside that.
The clock is set to 26 July 2024, noon: the only date that src/data/chat.rs knows.
"""
import datetime
import json
import pathlib

from transformers.utils import chat_template_utils

OUT = pathlib.Path(__file__).parent.parent / "chat-templates" / "cases.json"


class Clock(datetime.datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 26, 12, 0, 0)


TEMPLATES = {
    "chatml": (
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    ),
    "llama3": (
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    ),
    "mistral": (
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("After the optional system message, roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- endif %}
{%- endfor %}
""",
    ),
    "gemma": (
        {"bos_token": "<bos>", "eos_token": "<eos>"},
        """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}""",
    ),
    "zephyr": (
        {"bos_token": "<s>", "eos_token": "</s>"},
        """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
""",
    ),
    "llama2": (
        {"bos_token": "<s>", "eos_token": "</s>"},
        """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}{% set system = false %}{% endif %}
{% for message in rest %}{% if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}""",
    ),
    "idioms": (
        {"bos_token": "<s>", "eos_token": "</s>"},
        """{#- a comment -#}
{%- macro turn(role, text) -%}
[{{ role | upper }}] {{ text }}
{% endmacro -%}
{%- set ns = namespace(users=0, last='') %}
{%- for m in messages %}
  {%- if m.role == 'user' %}
    {%- set ns.users = ns.users + 1 %}
    {%- set ns.last = m.content.split('\\n')[-1].rstrip() %}
  {%- endif %}
  {%- if m.get('name') is none and m.content is string and m.content.startswith('Stop') %}
    {%- break %}
  {%- endif %}
  {% generation %}{{ turn(m.role, m['content'].replace('<', '(').lstrip()) }}{% endgeneration %}

{%- endfor %}
{{ ns.users }} of {{ messages | length }}; {{ ns.last }}; {{ add_generation_prompt }} {{ tools }} {{ undefined_name }}|
{{ messages | tojson }}
{{ {'a': [1, 2.5, true, none], 'b': {}} | tojson(indent=2) }}
{{ messages | map(attribute='role') | join(',') }} {{ 'x' if not documents else 'y' }} {{ messages[-1].content[:3] }}
{{ strftime_now('%Y-%m-%d, %A %B %d, %H:%M') }} {{ (messages[0].content | length) // 2 }} {{ 'a' in 'cat' }} {{ "%%" }}
{%+ if true %}kept{% endif +%}
{%- for role, count in {'u': 1, 'a': 2}.items() if count > 1 %} {{ role }}={{ count }}{% endfor %}
""",
    ),
}

CONVERSATIONS = {
    "one question": [{"role": "user", "content": "What is 2 + 2?"}],
    "with a system turn": [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "  Name a <color> & say \"why\"\nplease  "},
    ],
    "several turns": [
        {"role": "user", "content": "Hallo, wie geht's? \u00e4\u00f6\u00fc \u4f60\u597d \U0001f642"},
        {"role": "assistant", "content": " Gut, danke.\n"},
        {"role": "user", "content": "Stop it\n\nnow"},
    ],
    "an answer at the end": [
        {"role": "user", "content": "Say yes."},
        {"role": "assistant", "content": "Yes."},
    ],
    "two questions in a row": [
        {"role": "user", "content": "First"},
        {"role": "user", "content": "Second"},
    ],
}


def main():
    chat_template_utils.datetime = Clock
    cases = []
    for name, (tokens, source) in TEMPLATES.items():
        renderings = []
        for title, messages in CONVERSATIONS.items():
            for prompt in (False, True):
                try:
                    texts, _ = chat_template_utils.render_jinja_template(
                        conversations=[messages], chat_template=source, add_generation_prompt=prompt, **tokens
                    )
                    outcome = {"text": texts[0]}
                except Exception as error:
                    outcome = {"error": str(error)}
                renderings.append({"title": title, "messages": messages, "add_generation_prompt": prompt, **outcome})
        cases.append({"name": name, "special_tokens": tokens, "source": source, "renderings": renderings})
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(cases, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{OUT}: {sum(len(c['renderings']) for c in cases)} renderings")


if __name__ == "__main__":
    main()
