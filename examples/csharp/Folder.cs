// A bundle that edgephi exported, answered by onnxruntime-genai in this program. Not run here; see README.md.
//
// dotnet run -- path/to/bundle
using System.Text.Json;
using Microsoft.ML.OnnxRuntimeGenAI;

using var model = new Model(args[0]);
using var tokenizer = new Tokenizer(model);
using var pieces = tokenizer.CreateStream();

var messages = JsonSerializer.Serialize(new[] { new { role = "user", content = "What is the capital of Japan?" } });
// empty: the bundle's own template, and no tools
var prompt = tokenizer.ApplyChatTemplate("", messages, "", true);
using var tokens = tokenizer.Encode(prompt);

using var parameters = new GeneratorParams(model);
parameters.SetSearchOption("max_length", 512);
using var generator = new Generator(model, parameters);
generator.AppendTokenSequences(tokens);
while (!generator.IsDone())
{
    generator.GenerateNextToken();
    Console.Write(pieces.Decode(generator.GetSequence(0)[^1]));
}
Console.WriteLine();
