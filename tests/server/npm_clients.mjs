// Drives every route and every stream by the official npm clients; prints the names of the checks that held.
// Arguments: the server's address, a WAV file.
import assert from 'node:assert/strict';
import { createReadStream } from 'node:fs';
import OpenAI from 'openai';
import { zodResponseFormat, zodTextFormat } from 'openai/helpers/zod';
import Anthropic from '@anthropic-ai/sdk';
import { z } from 'zod';

const [url, wav] = process.argv.slice(2);
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'none', maxRetries: 0 });
const claude = new Anthropic({ baseURL: url, apiKey: 'none', maxRetries: 0 });
const messages = [{ role: 'user', content: 'What is the time?' }];
const Paint = z.object({ color: z.enum(['red', 'blue']), coats: z.union([z.literal(1), z.literal(2)]) });
const parameters = {
  type: 'object',
  properties: { color: { enum: ['red', 'blue'] }, coats: { enum: [1, 2] } },
  required: ['color', 'coats'],
  additionalProperties: false,
};
const tool = { type: 'function', function: { name: 'paint', description: 'Paints.', parameters, strict: true } };
const painted = (text) => Paint.parse(JSON.parse(text));

const checks = {
  async models() {
    const found = [];
    for await (const one of openai.models.list()) found.push(one.id);
    assert.ok(found.includes('lm') && found.includes('encoder'));
    assert.equal((await openai.models.retrieve('lm')).object, 'model');
  },

  async chat() {
    const body = { model: 'lm', messages, max_completion_tokens: 12, n: 2, logprobs: true, top_logprobs: 2 };
    const whole = await openai.chat.completions.create(body);
    assert.equal(whole.choices.length, 2);
    assert.equal(whole.choices[0].logprobs.content.length, 12);
    assert.equal(whole.choices[0].logprobs.content[0].top_logprobs.length, 2);
    assert.equal(whole.choices[0].finish_reason, 'length');
    const texts = ['', ''], tokens = [0, 0];
    let usage;
    const stream = await openai.chat.completions.create({ ...body, stream: true, stream_options: { include_usage: true } });
    for await (const chunk of stream) {
      usage = chunk.usage ?? usage;
      for (const choice of chunk.choices) {
        texts[choice.index] += choice.delta.content ?? '';
        tokens[choice.index] += choice.logprobs?.content?.length ?? 0;
      }
    }
    assert.deepEqual(texts, whole.choices.map((choice) => choice.message.content));
    assert.deepEqual(tokens, [12, 12]);
    assert.equal(usage.completion_tokens, 24);
  },

  async chat_stream_helper() {
    const body = { model: 'lm', messages, max_completion_tokens: 12 };
    const runner = openai.chat.completions.stream(body);
    let text = '';
    runner.on('content', (delta) => (text += delta));
    const found = await runner.finalChatCompletion();
    assert.equal(found.choices[0].message.content, text);
    assert.equal(text, (await openai.chat.completions.create(body)).choices[0].message.content);
  },

  async chat_stream_aborted() {
    const stream = await openai.chat.completions.create({ model: 'lm', messages, stream: true });
    for await (const chunk of stream) {
      assert.equal(chunk.object, 'chat.completion.chunk');
      stream.controller.abort();
    }
  },

  async chat_zod() {
    const body = { model: 'lm', messages, response_format: zodResponseFormat(Paint, 'paint') };
    const parsed = await openai.chat.completions.parse(body);
    assert.ok(['red', 'blue'].includes(parsed.choices[0].message.parsed.color));
    const streamed = await openai.chat.completions.stream(body).finalChatCompletion();
    assert.deepEqual(streamed.choices[0].message.parsed, parsed.choices[0].message.parsed);
    const again = [...messages, parsed.choices[0].message, messages[0]];  // with `parsed`
    assert.ok(await openai.chat.completions.create({ model: 'lm', messages: again, max_tokens: 2 }));
  },

  async chat_tools() {
    const body = {
      model: 'calls', messages, tools: [tool], tool_choice: 'required', parallel_tool_calls: false, max_tokens: 200,
    };
    const whole = await openai.chat.completions.create(body);
    const [call] = whole.choices[0].message.tool_calls;
    assert.equal(whole.choices[0].finish_reason, 'tool_calls');
    assert.equal(call.function.name, 'paint');
    const streamed = await openai.chat.completions.stream(body).finalChatCompletion();
    const [same] = streamed.choices[0].message.tool_calls;
    const parsed = (await openai.chat.completions.parse(body)).choices[0].message;  // with `parsed_arguments`
    assert.deepEqual(parsed.tool_calls[0].function.parsed_arguments, painted(call.function.arguments));
    assert.deepEqual(painted(same.function.arguments), painted(call.function.arguments));
    const next = await openai.chat.completions.create({
      model: 'calls', max_tokens: 6, tools: [tool], tool_choice: 'none',
      messages: [...messages, parsed, { role: 'tool', tool_call_id: parsed.tool_calls[0].id, content: 'done' }],
    });
    assert.equal(next.choices[0].message.role, 'assistant');
  },

  async run_tools() {
    const seen = [];
    const paint = (given) => (seen.push(Paint.parse(given)), 'done');
    const runner = openai.chat.completions.runTools(
      {
        model: 'calls', messages, max_tokens: 200, tool_choice: { type: 'function', function: { name: 'paint' } },
        tools: [{ type: 'function', function: { function: paint, parse: JSON.parse, name: 'paint', description: 'Paints.', parameters } }],
      },
      { maxChatCompletions: 2 },
    );
    await runner.done();
    assert.ok(seen.length >= 1);
    assert.ok(runner.messages.some((message) => message.role === 'tool' && message.content === 'done'));
  },

  async completions() {
    const body = { model: 'lm', prompt: ['The quick', 'One, two,'], max_tokens: 6, logprobs: 1 };
    const whole = await openai.completions.create(body);
    assert.equal(whole.choices.length, 2);
    assert.equal(whole.choices[0].logprobs.tokens.length, 6);
    const texts = ['', ''];
    for await (const chunk of await openai.completions.create({ ...body, stream: true })) {
      for (const choice of chunk.choices) texts[choice.index] += choice.text;
    }
    assert.deepEqual(texts, whole.choices.map((choice) => choice.text));
  },

  async embeddings() {
    const input = ['A man is eating.', 'It rains.'];
    const found = await openai.embeddings.create({ model: 'encoder', input });  // as base64, decoded by the client
    const floats = await openai.embeddings.create({ model: 'encoder', input, encoding_format: 'float' });
    assert.equal(found.data.length, 2);
    found.data[0].embedding.forEach((value, i) => assert.ok(Math.abs(value - floats.data[0].embedding[i]) < 1e-6));
    assert.ok(found.usage.prompt_tokens > 4);
  },

  async responses() {
    const body = { model: 'lm', input: messages, max_output_tokens: 12 };
    const whole = await openai.responses.create(body);
    assert.equal(whole.status, 'incomplete');
    let text = '', number = 0;
    for await (const event of await openai.responses.create({ ...body, stream: true })) {
      assert.equal(event.sequence_number, number++);
      if (event.type === 'response.output_text.delta') text += event.delta;
    }
    assert.equal(text, whole.output_text);
    const final = await openai.responses.stream(body).finalResponse();
    assert.equal(final.output_text, text);
  },

  async responses_zod() {
    const text = { format: zodTextFormat(Paint, 'paint') };
    const body = { model: 'lm', input: messages, text };
    const parsed = (await openai.responses.parse(body)).output_parsed;
    assert.ok(['red', 'blue'].includes(parsed.color));
    const final = await openai.responses.stream(body).finalResponse();
    assert.deepEqual(final.output_parsed, parsed);
    const again = { model: 'lm', input: [...messages, ...final.output, messages[0]], max_output_tokens: 2 };
    assert.ok(await openai.responses.create(again));
  },

  async responses_tools() {
    const tools = [{ type: 'function', name: 'paint', description: 'Paints.', parameters, strict: true }];
    const body = { model: 'calls', input: messages, tools, tool_choice: 'required', parallel_tool_calls: false };
    const [item] = (await openai.responses.stream(body).finalResponse()).output;
    assert.equal(item.type, 'function_call');
    painted(item.arguments);
    const output = { type: 'function_call_output', call_id: item.call_id, output: 'done' };
    const next = await openai.responses.create({ ...body, input: [...messages, item, output], tool_choice: 'none', max_output_tokens: 6 });
    assert.equal(next.output[0].type, 'message');
  },

  async audio() {
    const file = () => createReadStream(wav);
    const found = await openai.audio.transcriptions.create({ model: 'whisper', file: file() });
    assert.ok(found.text.length > 10);
    let text = '';
    for await (const event of await openai.audio.transcriptions.create({ model: 'whisper', file: file(), stream: true })) {
      if (event.type === 'transcript.text.delta') text += event.delta;
      else assert.equal(event.text, found.text);
    }
    assert.equal(text, found.text);
    const verbose = await openai.audio.transcriptions.create({
      model: 'whisper', file: file(), response_format: 'verbose_json', timestamp_granularities: ['segment'],
    });
    assert.ok(verbose.segments.length > 0 && verbose.segments[0].end >= verbose.segments[0].start);
    const srt = await openai.audio.transcriptions.create({ model: 'whisper', file: file(), response_format: 'srt' });
    assert.match(srt, /^1\n00:00:0/);
    assert.ok((await openai.audio.translations.create({ model: 'whisper', file: file() })).text.length > 0);
  },

  async messages() {
    const body = { model: 'lm', messages, max_tokens: 12 };
    const whole = await claude.messages.create(body);
    assert.equal(whole.content[0].type, 'text');
    assert.equal(whole.stop_reason, 'max_tokens');
    const stream = claude.messages.stream(body);
    let text = '';
    stream.on('text', (delta) => (text += delta));
    assert.equal((await stream.finalMessage()).content[0].text, text);
    assert.equal(text, whole.content[0].text);
    const counted = await claude.messages.countTokens({ model: 'lm', messages });
    assert.equal(counted.input_tokens, whole.usage.input_tokens + whole.usage.cache_read_input_tokens);
  },

  async messages_tools() {
    const tools = [{ name: 'paint', description: 'Paints.', input_schema: parameters }];
    const choice = { type: 'any', disable_parallel_tool_use: true };
    const body = { model: 'calls', messages, tools, tool_choice: choice, max_tokens: 200 };
    const found = await claude.messages.stream(body).finalMessage();
    assert.equal(found.stop_reason, 'tool_use');
    Paint.parse(found.content[0].input);
    const result = { type: 'tool_result', tool_use_id: found.content[0].id, content: 'done' };
    const next = await claude.messages.create({
      ...body, max_tokens: 6, tool_choice: { type: 'none' },
      messages: [...messages, { role: 'assistant', content: found.content }, { role: 'user', content: [result] }],
    });
    assert.equal(next.role, 'assistant');
  },

  async errors() {
    const wrong = openai.chat.completions.create({ model: 'lm', messages, top_p: 7 });
    await assert.rejects(wrong, (error) => error instanceof OpenAI.BadRequestError && error.param === 'top_p');
    const none = openai.chat.completions.create({ model: 'gpt-9', messages });
    await assert.rejects(none, (error) => error instanceof OpenAI.NotFoundError && error.code === 'model_not_found');
    const claudes = claude.messages.create({ model: 'lm', messages, max_tokens: 4, top_p: 7 });
    await assert.rejects(claudes, (error) => error instanceof Anthropic.BadRequestError);
  },
};

for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    console.log(`held ${name}`);
  } catch (error) {
    console.log(`broke ${name}: ${error?.stack ?? error}`);
  }
}
process.exit(0);
