"""OpenAI's own client against `edgephi serve`: an answer, a stream, JSON of a schema, a function that is called.

edgephi serve phi-4-mini
python examples/server_client.py http://127.0.0.1:8080 phi-4-mini
"""

import json
import sys

from openai import OpenAI
from pydantic import BaseModel


class City(BaseModel):
    name: str
    country: str


url, model = sys.argv[1:]
client = OpenAI(base_url=f"{url}/v1", api_key="none")
question = [{"role": "user", "content": "What is the capital of Japan?"}]

done = client.chat.completions.create(model=model, messages=question, max_tokens=30)
print(done.choices[0].message.content.replace("\n", " "))

stream = client.chat.completions.create(model=model, messages=question, max_tokens=30, stream=True)
print("".join(chunk.choices[0].delta.content or "" for chunk in stream).replace("\n", " "))

city = client.chat.completions.parse(model=model, messages=question, max_tokens=60, response_format=City)
print(city.choices[0].message.parsed)

parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
tool = {"type": "function", "function": {"name": "clock", "description": "Tells the time.", "parameters": parameters}}
asked = client.chat.completions.create(
    model=model, messages=question, max_tokens=60, tools=[tool], tool_choice="required"
)
call = asked.choices[0].message.tool_calls[0].function
print(f"call {call.name} with {json.loads(call.arguments)}")
