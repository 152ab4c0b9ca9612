// OpenAI's client for .NET against `edgephi serve`. Not run here; see README.md.
//
// edgephi serve phi-4-mini
// dotnet run -- http://127.0.0.1:8080 phi-4-mini
using System.ClientModel;
using OpenAI;
using OpenAI.Chat;

var options = new OpenAIClientOptions { Endpoint = new Uri($"{args[0]}/v1") };
var client = new ChatClient(args[1], new ApiKeyCredential("none"), options);

foreach (StreamingChatCompletionUpdate update in client.CompleteChatStreaming("What is the capital of Japan?"))
{
    foreach (ChatMessageContentPart part in update.ContentUpdate)
    {
        Console.Write(part.Text);
    }
}
Console.WriteLine();
