"""Chat templates that behave as those of common families do, in short: where they end a turn, what they drop or move.

Prompts for tools are shortened; the order of things, white space and special tokens are the families' own.
"""

# ruff: noqa: E501
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from helpers.sft import byte_level_tokenizer

_TOOLS_OF_QWEN = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}"
    "{{- '\\n\\n# Tools\\n<tools>' }}{%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}"
    "{{- '\\n</tools><|im_end|>\\n' }}"
    "{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
    "{%- endif %}"
)
_RESULTS_OF_QWEN = (
    "{%- elif message.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
QWEN25 = (
    _TOOLS_OF_QWEN + "{%- for message in messages %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) or "
    "(message.role == 'assistant' and not message.tool_calls) %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant' }}"
    "{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}"
    "{%- for call in message.tool_calls %}{%- if call.function is defined %}{%- set call = call.function %}{%- endif %}"
    '{{- \'\\n<tool_call>\\n{"name": "\' + call.name + \'", "arguments": \' }}{{- call.arguments | tojson }}'
    "{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}" + _RESULTS_OF_QWEN
)
QWEN3 = (
    _TOOLS_OF_QWEN + "{%- set ns = namespace(last=messages | length - 1, open=true) %}"
    "{%- for message in messages[::-1] %}{%- if ns.open and message.role == 'user' %}"
    "{%- set ns.open = false %}{%- set ns.last = messages | length - 1 - loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- set content = message.content if message.content is string else '' %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}"
    "{%- elif message.role == 'assistant' %}{%- set thought = '' %}"
    "{%- if message.reasoning_content is string %}{%- set thought = message.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{%- set content = content.lstrip('\\n') %}{%- endif %}"
    "{{- content }}"
    "{%- for call in message.tool_calls or [] %}{%- if content or not loop.first %}{{- '\\n' }}{%- endif %}"
    "{%- if call.function %}{%- set call = call.function %}{%- endif %}"
    '{{- \'<tool_call>\\n{"name": "\' + call.name + \'", "arguments": \' }}'
    "{%- if call.arguments is string %}{{- call.arguments }}{%- else %}{{- call.arguments | tojson }}{%- endif %}"
    "{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}" + _RESULTS_OF_QWEN
)
LLAMA3 = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
#: List content is printed as Python's repr by this older form, which joins with ~ where others add strings.
LLAMA3_TILDE = LLAMA3.replace("message['content'] | trim + ", "message['content'] ~ ")
LLAMA31 = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system + '<|eot_id|>' }}"
    "{%- if tools %}{{- '<|start_header_id|>user<|end_header_id|>\\n\\n' }}"
    "{%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}{%- endfor %}"
    "{{- messages[0]['content'] | trim + '<|eot_id|>' }}{%- set messages = messages[1:] %}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if not (message.role == 'tool' or 'tool_calls' in message) %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{%- elif 'tool_calls' in message %}{%- if message.tool_calls | length != 1 %}"
    "{{- raise_exception('This model only supports single tool-calls at once!') }}{%- endif %}"
    "{%- set call = message.tool_calls[0].function %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{{- '{\"name\": \"' + call.name + '\", \"parameters\": ' + call.arguments | tojson + '}<|eot_id|>' }}"
    "{%- else %}{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}"
    "{%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}"
    "{%- else %}{{- message.content }}{%- endif %}{{- '<|eot_id|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<s>[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + ' </s>' }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set messages = messages[1:] %}"
    "{%- endif %}{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}{{- '<s>' }}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' %}"
    "{%- if tools and message == users[-1] %}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}"
    "{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\\n\\n' + message.content + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message.content + '[/INST]' }}{%- endif %}"
    "{%- elif message.tool_calls is defined and message.tool_calls is not none %}{{- '[TOOL_CALLS] [' }}"
    "{%- for call in message.tool_calls %}{%- set out = call.function | tojson %}"
    "{%- if call.id is not defined or call.id | length != 9 %}"
    "{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{%- endif %}"
    "{{- out[:-1] + ', \"id\": \"' + call.id + '\"}' }}{{- ', ' if not loop.last else ']</s>' }}{%- endfor %}"
    "{%- elif message.role == 'assistant' %}{{- ' ' + message.content | trim + '</s>' }}"
    "{%- elif message.role == 'tool' %}"
    "{%- if message.tool_call_id is not defined or message.tool_call_id | length != 9 %}"
    "{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{%- endif %}"
    "{{- '[TOOL_RESULTS] {\"content\": ' + message.content + ', \"call_id\": \"' + message.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{%- else %}{{- raise_exception('Only user and assistant roles are supported!') }}{%- endif %}{%- endfor %}"
)
GEMMA = (
    "<bos>{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' + "
    "message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
#: Roles that it does not know vanish.
ZEPHYR = (
    "{% for message in messages %}{% if message['role'] in ['user', 'system', 'assistant'] %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
R1 = (
    "{%- set ns = namespace(tool=false, called=false, system='') -%}"
    "{%- for m in messages %}{%- if m.role == 'system' %}{%- set ns.system = m.content %}{%- endif %}{%- endfor -%}"
    "{{- '<s>' + ns.system }}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.tool = false %}{{- '<User>' + m.content }}{%- endif %}"
    "{%- if m.role == 'assistant' and m.tool_calls %}{%- set ns.tool = false %}{%- for call in m.tool_calls %}"
    "{{- '\\n' if ns.called else '<Assistant><calls>' }}{%- set ns.called = true %}"
    "{{- '<call>' + call.type + '<sep>' + call.function.name + '\\n```json\\n' + call.function.arguments + '\\n```</call>' }}"
    "{%- endfor %}{{- '</calls><eos>' }}{%- endif %}"
    "{%- if m.role == 'assistant' and m.content is not none %}"
    "{%- if ns.tool %}{{- '</outputs>' + m.content + '<eos>' }}{%- set ns.tool = false %}"
    "{%- else %}{%- set content = m.content.split('</think>')[-1] %}{{- '<Assistant>' + content + '<eos>' }}{%- endif %}"
    "{%- endif %}"
    "{%- if m.role == 'tool' %}{{- '<output>' if ns.tool else '<outputs><output>' }}{%- set ns.tool = true %}"
    "{{- m.content + '</output>' }}{%- endif %}{%- endfor %}"
    "{%- if ns.tool %}{{- '</outputs>' }}{%- endif %}"
    "{%- if add_generation_prompt and not ns.tool %}{{- '<Assistant><think>\\n' }}{%- endif %}"
)
#: The first R1-distill template: its prompt does not open the thought.
R1_FIRST = R1.replace("<Assistant><think>\\n'", "<Assistant>'")
#: QwQ's prompt opens the thought, and its turns have it.
QWQ = QWEN3.replace("'<|im_start|>assistant\\n' }}{%- endif %}", "'<|im_start|>assistant\\n<think>\\n' }}{%- endif %}")
GPTOSS = (
    "{{- '<|start|>system<|message|>You are ChatGPT.<|end|>' }}"
    "{%- if messages[0].role in ['system', 'developer'] %}{%- set developer = messages[0].content %}"
    "{%- set messages = messages[1:] %}{%- endif %}"
    "{%- if developer or tools %}{{- '<|start|>developer<|message|>' }}"
    "{%- if developer %}{{- '# Instructions\\n\\n' + developer + '\\n\\n' }}{%- endif %}"
    "{%- for tool in tools or [] %}{{- 'type ' + tool.function.name + ' = (_: {\\n' }}"
    "{%- for name, spec in tool.function.parameters.properties.items() %}{{- name + ': ' + spec.type + ',\\n' }}"
    "{%- endfor %}{{- '}) => any;\\n' }}{%- endfor %}{{- '<|end|>' }}{%- endif %}"
    "{%- set last = namespace(name=none) %}{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}"
    "{%- if 'content' in message and '<|channel|>' in message.content %}{{- raise_exception('channel tags') }}{%- endif %}"
    "{%- if 'tool_calls' in message %}{%- set call = message.tool_calls[0].function %}"
    "{%- if message.content and message.thinking %}{{- raise_exception('both content and thinking') }}"
    "{%- elif message.content or message.thinking %}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + (message.content or message.thinking) + '<|end|>' }}{%- endif %}"
    "{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}"
    "{{- call.arguments | tojson + '<|call|>' }}{%- set last.name = call.name %}"
    "{%- elif loop.last and not add_generation_prompt %}"
    "{%- if 'thinking' in message %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}"
    "{%- endif %}{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}"
    "{%- else %}{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}{%- endif %}"
    "{%- elif message.role == 'tool' %}"
    "{{- '<|start|>functions.' + last.name + ' to=assistant<|channel|>commentary<|message|>' + message.content | tojson + '<|end|>' }}"
    "{%- else %}{{- '<|start|>user<|message|>' + message.content + '<|end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
)
#: Templates of models that see take lists of parts; some print nothing of text that is no list.
PARTS = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template and the special tokens that go with it."""

    template: str
    eos: str
    specials: tuple[str, ...] = ()

    def tokenizer(self) -> Any:
        tokenizer = byte_level_tokenizer(template=self.template, eos=self.eos)
        tokenizer.add_special_tokens({"additional_special_tokens": list(self.specials)})
        return tokenizer


FAMILIES = {
    "qwen2.5": Family(QWEN25, "<|im_end|>"),
    "qwen3": Family(QWEN3, "<|im_end|>"),
    "qwq": Family(QWQ, "<|im_end|>"),
    "llama2": Family(LLAMA2, "</s>"),
    "llama3": Family(LLAMA3, "<|eot_id|>"),
    "llama3.1": Family(LLAMA31, "<|eot_id|>"),
    "mistral": Family(MISTRAL, "</s>", ("[INST]", "[/INST]", "[TOOL_CALLS]")),
    "gemma": Family(GEMMA, "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "phi3": Family(PHI3, "<|endoftext|>", ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")),
    "zephyr": Family(ZEPHYR, "</s>"),
    "r1": Family(R1, "<eos>", ("<User>", "<Assistant>")),
    "r1 of January": Family(R1_FIRST, "<eos>", ("<User>", "<Assistant>")),
    "gpt-oss": Family(GPTOSS, "<|return|>", ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>")),
    "parts": Family(PARTS, "<|endoftext|>", ("<|end|>",)),
}
