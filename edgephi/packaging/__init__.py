"""A bundle becomes what an app's installer needs: model, licences, bill of materials, wheels. `edgephi package`."""
